"""The guard: what it measures, what it chooses, and what a run does with it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granq_jax.modes.loop
from granq_jax import create_model, quantize, train_and_evaluate
from granq_jax.config import load_config
from granq_jax.distill import guard
from granq_jax.errors import RunError
from granq_jax.modes.evaluate import evaluate_run
from granq_jax.report.reading import read_run
from granq_jax.runs.checkpoint import save_variables
from tests.distill.test_joint_run import make_trainer
from tests.modes.test_train import metrics_of, tiny_config

errors_by_step = st.dictionaries(st.integers(1, 50), st.floats(1e-3, 10), max_size=8)


def scores_of(errors):
    return {step: guard.Score(error, 90.0) for step, error in errors.items()}


@hypothesis.given(errors_by_step)
def test_the_newest_before_a_breakdown_is_chosen(errors):
    scores = scores_of(errors)
    end, chosen = guard.breakdown(scores), guard.chosen(scores)
    before = {step: error for step, error in errors.items() if end is None or step < end}
    assert chosen == max(before, default=None)
    if end is not None:
        assert errors[end] > max(1, guard.LIMIT * min([1, *before.values()]))


@hypothesis.given(errors_by_step)
def test_a_student_that_is_better_than_before_its_training_has_not_broken_down(errors):
    assert guard.breakdown(scores_of({step: min(error, 1.0) for step, error in errors.items()})) is None


@hypothesis.given(errors_by_step)
def test_what_is_chosen_never_goes_back(errors):
    """So that the checkpoint of what is chosen is there."""
    steps = sorted(errors)
    chosen = [guard.chosen(scores_of({s: errors[s] for s in steps[: i + 1]})) or 0 for i in range(len(steps))]
    assert chosen == sorted(chosen)


def test_an_error_that_is_no_number_is_a_breakdown():
    assert guard.breakdown(scores_of({1: 0.5, 2: float("nan")})) == 2
    assert guard.chosen(scores_of({1: 0.5, 2: float("nan")})) == 1


@pytest.fixture(scope="module")
def network():
    trainer = make_trainer()
    teacher = jax.jit(trainer.model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    return trainer, teacher


def test_held_out_images_are_three_sources_and_always_the_same(network):
    trainer, teacher = network
    generator = trainer.init(teacher).generator
    images = guard.held_out_images(trainer, generator)
    plain, moved, mixed = images
    assert images.shape == (3, len(plain), 8, 8, 1)
    np.testing.assert_array_equal(images, guard.held_out_images(trainer, generator))
    np.testing.assert_allclose(mixed, (plain + np.roll(plain, 1, 0)) / 2, atol=1e-5)
    for before, after in zip(plain, moved, strict=True):  # a compiler may round what it computes twice otherwise
        assert np.abs(after.reshape(-1, 1) - before.reshape(1, -1)).min(1).max() < 1e-5
    assert (moved != plain).any(axis=(1, 2, 3)).mean() > 0.5


@pytest.mark.slow
def test_the_score_is_the_worst_median_of_the_relative_variance(network):
    trainer, teacher = network
    images = guard.held_out_images(trainer, trainer.init(teacher).generator)
    score = guard.scorer(trainer, teacher, images)
    assert score(teacher).error == pytest.approx(1)
    student = jax.tree.map(lambda leaf: 1.05 * leaf, teacher)
    quantized = quantize(trainer.model, trainer.spec)
    in_full, rounded = (
        jax.jit(lambda v, x, net=net: net.apply(v, x, train=False)) for net in (trainer.model, quantized)
    )

    def medians(variables):
        found = []
        for source in images:
            t, s = np.asarray(in_full(teacher, source), np.float64), np.asarray(rounded(variables, source), np.float64)
            found.append(np.median((t - s).var(1) / t.var(1)))
        return np.array(found)

    # A code that falls on the other level moves an image's logits.
    assert score(student).error == pytest.approx((medians(student) / medians(teacher)).max(), rel=0.05)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A digits teacher, random: what the loop does with scores does not depend on it."""
    config = tiny_config()
    variables = jax.jit(create_model(config.network).init)(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_variables(path, variables)
    return str(path)


def scripted(errors):
    """A scorer that gives these errors, one after the other."""
    left = iter(errors)
    return lambda trainer, teacher, images: lambda variables: guard.Score(next(left), 90.0)


@pytest.mark.slow
def test_a_run_that_breaks_down_ends_and_gives_the_student_before(teacher_file, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(granq_jax.modes.loop.guard, "scorer", scripted([0.5, 0.3, 1.2]))
    changes = {"teacher": teacher_file, "epochs": 6, "eval_every_epochs": 1, "keep_best": False, "keep_checkpoints": 1}
    result = train_and_evaluate(tiny_config(**changes), tmp_path)
    assert (result["broke_down_after"], result["steps"], result["chosen_step"]) == (16, 16, 12)
    assert [score["error"] for score in result["guard"]] == [0.5, 0.3, 1.2]
    assert "BREAKS DOWN" in capsys.readouterr().err
    by_step = {line["step"]: line["student_top1"] for line in metrics_of(tmp_path) if "student_top1" in line}
    assert result["student_top1"] == by_step[12]
    evaluation = evaluate_run(load_config(tmp_path / "config.json"), tmp_path)
    assert (evaluation["step"], evaluation["student_top1"]) == (12, by_step[12])
    assert read_run(tmp_path).step == 12
    assert train_and_evaluate(tiny_config(**changes), tmp_path) == result  # it is finished


@pytest.mark.slow
def test_a_run_may_go_on_after_a_breakdown(teacher_file, monkeypatch, tmp_path):
    monkeypatch.setattr(granq_jax.modes.loop.guard, "scorer", scripted([0.5, 1.2]))
    result = train_and_evaluate(
        tiny_config(teacher=teacher_file, eval_every_epochs=1, on_breakdown="go_on", eval="none"), tmp_path
    )
    assert (result["broke_down_after"], result["steps"], result["chosen_step"]) == (12, 12, 8)


@pytest.mark.slow
def test_a_run_that_goes_on_uses_the_images_it_had(teacher_file, monkeypatch, tmp_path):
    config = tiny_config(teacher=teacher_file, epochs=4, eval_every_epochs=1, eval="none", checkpoint_every_epochs=1)
    whole = train_and_evaluate(config, tmp_path / "whole")
    plain = granq_jax.modes.loop.Loop._look_at_score

    def look_and_fail(self, epoch):
        plain(self, epoch)
        if epoch == 3:
            raise RunError("broken off")

    with monkeypatch.context() as context:
        context.setattr(granq_jax.modes.loop.Loop, "_look_at_score", look_and_fail)
        with pytest.raises(RunError, match="broken off"):
            train_and_evaluate(config, tmp_path / "broken")
    assert (tmp_path / "broken" / "held_out.safetensors").is_file()
    monkeypatch.delattr(granq_jax.modes.loop.Loop, "_new_guard")  # the images are not made again
    assert train_and_evaluate(config, tmp_path / "broken")["guard"] == whole["guard"]


@pytest.mark.slow
def test_no_warm_up_no_guard(teacher_file, tmp_path, capsys):
    result = train_and_evaluate(tiny_config(teacher=teacher_file, warmup_epochs=0, eval="none"), tmp_path)
    assert (result["guard"], result["chosen_step"], result["broke_down_after"]) == ([], 12, None)
    assert "no guard" in capsys.readouterr().err
