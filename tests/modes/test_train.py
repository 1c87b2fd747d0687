"""Whole runs of a few steps, and what they leave behind."""

import contextlib
import json
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import granq_jax.modes.loop
import granq_jax.modes.opening
import granq_jax.modes.train
from granq_jax import load_config, load_torch, train_and_evaluate
from granq_jax.config import make_trainer
from granq_jax.data.datasets import load_split
from granq_jax.distill.joint_run import JointRun
from granq_jax.distill.trainer import TrainState
from granq_jax.errors import InputError, RunError
from granq_jax.modes.evaluate import evaluate_run
from granq_jax.report.__main__ import main as write_report
from granq_jax.runs.accuracy import float_accuracy
from granq_jax.runs.checkpoint import Checkpoints, save_variables
from granq_jax.runtime.devices import place
from granq_jax.runtime.stopping import Interrupted
from granq_jax.teachers.torch_import import torch_name
from tests.conftest import one_line_error
from tests.digits import digits
from tests.runs.test_checkpoint import largest_file
from tests.runs.test_metrics import read_events, summaries

RESULT = {
    *("dataset", "eval_examples", "network", "weight_bits", "act_bits", "weight_granularity", "act_granularity"),
    *("teacher_top1", "student_top1_before", "student_top1", "best_top1", "best_step", "steps", "seconds_per_step"),
    *("compile_seconds", "peak_rss_mb", "seed", "devices", "versions", "effective_weight_bits"),
    *("effective_act_bits", "storage_bytes", "activation_bytes", "quantized_shares"),
}
TRAIN_LINE = ["step", "epoch", "loss_g", "loss_s", "hinge", "onehot", "bns", "lr_g", "lr_s", "seconds"]


def tiny_config(**changes):
    config = digits()
    config.epochs, config.steps_per_epoch, config.warmup_epochs = 3, 4, 1
    config.batch_size, config.log_every_steps, config.eval_every_epochs = 8, 3, 2
    config.teacher_training.epochs, config.teacher_training.small_epochs = 2, 0
    config.decay_epochs = (2,)
    config.update_from_flattened_dict(changes)
    return config


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def training_lines(workdir):
    return [line for line in metrics_of(workdir) if "loss_g" in line]


def state_like(config):
    trainer = make_trainer(config)
    images = np.ones((1, 8, 8, 1), np.float32)
    return trainer.state_shapes(jax.eval_shape(trainer.model.init, jax.random.key(0), images))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_and_evaluate(tiny_config(), workdir)


def test_the_result(finished, table):
    workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result.keys() >= RESULT | set(table.MEASURED)
    assert (result["steps"], result["eval_examples"], result["best_step"] % 4) == (12, 360, 0)
    for subject in ("teacher_{}", "student_{}_before", "student_{}"):
        assert 0 <= result[subject.format("top1")] <= result[subject.format("top5")] <= 100
    assert result["best_top1"] >= result["student_top1"]
    assert {str(result["best_step"]), "12"} <= {path.name for path in (workdir / "checkpoints").iterdir()}
    assert 3.0 < result["effective_weight_bits"] < 4.0
    assert result["quantized_shares"]["weights"] == 1
    assert 0.8 < result["quantized_shares"]["layer_inputs"] < 1  # the image and the pooled features are not


def test_the_metrics(finished):
    lines, training = metrics_of(finished[0]), training_lines(finished[0])
    assert [line["step"] for line in training] == [3, 4, 6, 8, 9, 12]
    assert [line["epoch"] for line in training] == [0, 1, 1, 2, 2, 3]
    assert [line["lr_s"] for line in training] == pytest.approx([1e-3] * 4 + [1e-4] * 2)
    for line in training:
        assert list(line) == TRAIN_LINE
        assert np.isfinite(list(line.values())).all()
        # The generator's loss is the sum of its terms, all of weight 1 here.
        assert line["loss_g"] == pytest.approx(line["hinge"] + line["onehot"] + line["bns"], rel=1e-5)
    evaluations = [line for line in lines if "student_top1" in line]
    assert [list(line) for line in evaluations] == [["step", "epoch", "student_top1"]] * 2
    assert [line["step"] for line in evaluations] == [8, 12]


@pytest.mark.slow
def test_the_trace(finished, tmp_path):
    config = tiny_config(**{"eval": "none", "profile.start": 2, "profile.steps": 3})
    config.teacher = str(finished[0] / "teacher.safetensors")
    train_and_evaluate(config, tmp_path)
    names = {path.name.split(".", 1)[1] for path in (tmp_path / "profile").rglob("*.*") if path.is_file()}
    assert "xplane.pb" in names  # XProf
    assert "json.gz" in names  # Perfetto


@pytest.mark.parametrize(
    ("taken", "events"),
    [
        (range(2, 8), [("start", 4), ("stop", 6)]),
        (range(5, 8), [("start", 5), ("stop", 6)]),  # a run that goes on within
        (range(2, 6), [("start", 4), ("stop", 5)]),  # and one that ends within
        (range(7, 9), []),
    ],
)
def test_the_steps_that_are_traced(monkeypatch, tmp_path, taken, events):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: seen.append(("start", run.step + 1)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop", run.step)))
    run = types.SimpleNamespace(step=taken[0] - 1, state=())
    with granq_jax.modes.loop._Trace(tiny_config(**{"profile.start": 3, "profile.steps": 3}), tmp_path) as trace:
        for step in taken:
            with trace.step(run):
                run.step = step
    assert seen == events


def without_seconds(workdir):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics_of(workdir)]


def test_the_report_is_made_again_from_the_files(finished, tmp_path):
    workdir, _ = finished
    assert write_report([str(workdir), f"--output={tmp_path / 'again.html'}"]) == 0
    assert (tmp_path / "again.html").read_text() == (workdir / "report.html").read_text()


def test_tensorboard_is_told_what_the_metrics_say(finished):
    logged = summaries(read_events(finished[0]))
    for line in metrics_of(finished[0]):
        for name in line.keys() & {"loss_g", "loss_s", "hinge", "onehot", "bns", "student_top1"}:
            (value,) = {v.simple_value for step, v in logged if step == line["step"] and v.tag.endswith(f"/{name}")}
            assert value == pytest.approx(line[name], rel=1e-6)
    looks = [(step, value.tag) for step, value in logged if value.HasField("image") or value.HasField("histo")]
    assert {step for step, _ in looks} == {8, 12}
    histograms = {tag for _, tag in looks if tag.startswith("codes/")}
    assert {"codes/weight/stem/conv", "codes/activation/stem/norm/act"} <= histograms


def test_who_started_the_run_is_on_record(finished):
    (start,) = [json.loads(line) for line in (finished[0] / "starts.jsonl").read_text().splitlines()]
    assert start["command"] == ""  # a call from a program
    assert start["versions"] == finished[1]["versions"]


@pytest.mark.slow
def test_a_run_is_reproducible(finished, tmp_path):
    train_and_evaluate(tiny_config(), tmp_path)
    assert without_seconds(tmp_path) == without_seconds(finished[0])


def test_a_finished_run_is_evaluated(finished):
    workdir, result = finished
    evaluation = evaluate_run(load_config(workdir / "config.json"), workdir)
    assert evaluation["student_top1"] == result["student_top1"]
    assert evaluation["step"] == result["steps"]
    assert json.loads((workdir / "evaluation.json").read_text()) == evaluation
    assert "teacher_top1" not in evaluation
    both = evaluate_run(load_config(workdir / "config.json"), workdir, "both")
    assert [both[key] for key in ("teacher_top1", "teacher_top5", "student_top1", "student_top5")] == [
        result[key] for key in ("teacher_top1", "teacher_top5", "student_top1", "student_top5")
    ]


def test_a_student_checkpoint_loads_into_the_float_model(finished):
    trainer = make_trainer(tiny_config())
    with Checkpoints(finished[0], read_only=True) as checkpoints:
        state = checkpoints.newest(state_like(tiny_config())).state
    assert isinstance(state, TrainState)
    assert int(state.step) == 12
    accuracy = float_accuracy(trainer.model, load_split("digits", "test"), 120, jax.local_devices())
    assert accuracy(state.student).top1 > 50


def test_the_size_of_evaluation_batches_does_not_matter(finished):
    workdir, result = finished
    config = load_config(workdir / "config.json")
    config.eval_batch_size = 77
    # But for a value so near a rounding boundary that another program takes the other level.
    one_image = 100 / 360
    assert evaluate_run(config, workdir)["student_top1"] == pytest.approx(result["student_top1"], abs=1.01 * one_image)


@contextlib.contextmanager
def at_step(number, action):
    """Calls ``action`` with the run as it has taken the step ``number``."""
    advance = JointRun.advance

    def advance_and_act(self, warmup):
        metrics = advance(self, warmup)
        if self.step == number:
            action(self)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointRun, "advance", advance_and_act)
        yield


def assert_equal_runs(ours, theirs):
    """Parameters, optimizer states and all that was written, but for time and memory."""
    states, records = [], []
    like = state_like(tiny_config())
    for workdir in (ours, theirs):
        with Checkpoints(workdir, read_only=True) as checkpoints:
            states.append(checkpoints.newest(like))
        result = json.loads((workdir / "result.json").read_text())
        measured = ("seconds_per_step", "compile_seconds", "peak_rss_mb")
        records.append(({k: v for k, v in result.items() if k not in measured}, without_seconds(workdir)))
    assert states[0].step == states[1].step
    jax.tree.map(np.testing.assert_array_equal, states[0].state, states[1].state)
    assert records[0] == records[1]


@pytest.fixture
def interrupts_as_in_a_terminal():
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interrupts_as_in_a_terminal")
@pytest.mark.parametrize(("signum", "status", "step"), [(signal.SIGTERM, 143, 7), (signal.SIGINT, 130, 4)])
def test_a_run_that_was_interrupted_ends_as_if_it_was_not(finished, tmp_path, signum, status, step):
    with (
        at_step(step, lambda _: signal.raise_signal(signum)),
        pytest.raises(Interrupted, match=f"step {step}, which is saved") as caught,
    ):
        train_and_evaluate(tiny_config(), tmp_path)
    assert caught.value.exit_status == status
    assert not (tmp_path / "result.json").exists()
    before = (tmp_path / "config.json").read_bytes()
    with one_line_error(ValueError, "config.student.lr", "0.5", "0.001"):
        train_and_evaluate(tiny_config(**{"student.lr": 0.5}), tmp_path)
    if step > 4:
        with one_line_error(ValueError, "config.epochs", "got 1", f"{step} steps", "from 2"):
            train_and_evaluate(tiny_config(epochs=1), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    train_and_evaluate(tiny_config(), tmp_path)
    assert_equal_runs(tmp_path, finished[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what Orbax had begun
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path, caplog):
    config = tiny_config(checkpoint_every_epochs=1)
    with at_step(10, _out_of_memory), pytest.raises(MemoryError):  # ends it at once, as a kill does
        train_and_evaluate(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    for path in (tmp_path / "checkpoints" / "8").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    train_and_evaluate(config, tmp_path)
    assert "checkpoint of step 8" in caplog.text
    assert_equal_runs(tmp_path, finished[0])


def _out_of_memory(_):
    raise MemoryError


def test_a_finished_run_returns_its_result_and_can_be_made_longer(finished, tmp_path, monkeypatch):
    workdir, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(granq_jax.modes.train, "JointRun", None)
        assert train_and_evaluate(tiny_config(), workdir) == result
    assert (workdir / "metrics.jsonl").read_bytes() == before
    with one_line_error(ValueError, "workdir", str(workdir), "already holds a run", "--overwrite"):
        train_and_evaluate(tiny_config(resume=False), workdir)
    shutil.copytree(workdir, tmp_path / "run")
    longer = train_and_evaluate(tiny_config(epochs=4), tmp_path / "run")
    assert longer["steps"] == 16
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(before)


@pytest.mark.slow
def test_what_cannot_be_begun_overwrites_nothing(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "broken.npz").write_bytes(b"broken")
    before = sorted((tmp_path / "run").rglob("*"))
    for changes in ({"teacher": str(tmp_path / "broken.npz")}, {"teacher_training.batch_size": 2000}):
        with pytest.raises(ValueError, match=r"broken.npz|batch_size"):
            train_and_evaluate(tiny_config(**changes), tmp_path / "run", overwrite=True)
        assert sorted((tmp_path / "run").rglob("*")) == before
    config = tiny_config(eval="none", epochs=2)
    assert train_and_evaluate(config, tmp_path / "run", overwrite=True)["steps"] == 8


def test_a_run_goes_on_with_its_own_teacher_only(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    variables = load_torch("resnet8_digits", finished[0] / "teacher.safetensors")
    save_variables(tmp_path / "other.safetensors", jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1.5, variables))
    config = tiny_config(epochs=4, teacher=str(tmp_path / "other.safetensors"))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with one_line_error(ValueError, "config.teacher", "other.safetensors", "--overwrite"):
        train_and_evaluate(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def spoil_generator(run):
    generator = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), run.state.generator)
    run.state = place(run.state.replace(generator=generator), run.devices)


@pytest.mark.slow
def test_a_run_that_is_no_longer_finite_stops_before_it_is_saved(finished, tmp_path):
    config = tiny_config(eval="none", checkpoint_every_epochs=1, log_every_steps=1)
    config.teacher = str(finished[0] / "teacher.safetensors")
    words = ("step 7: ", "not finite", "newest checkpoint is of step 4", "--config.on_nonfinite=skip")
    with at_step(6, spoil_generator), one_line_error(RunError, *words):
        train_and_evaluate(config, tmp_path)
    assert [line["step"] for line in training_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "4" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    config.on_nonfinite = "skip"  # which the run may go on with
    with at_step(9, spoil_generator):
        result = train_and_evaluate(config, tmp_path)
    assert result["skipped_steps"] == 3  # the generator stays as it was spoiled
    assert [line["step"] for line in training_lines(tmp_path)] == list(range(1, 13))
    assert training_lines(tmp_path)[-1]["loss_g"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what Orbax had begun
def test_a_full_disk_ends_a_run(finished, tmp_path):
    config = tiny_config(eval="none", checkpoint_every_epochs=1, teacher=str(finished[0] / "teacher.safetensors"))
    with (
        contextlib.ExitStack() as disk,
        at_step(6, lambda _: disk.enter_context(largest_file(100_000))),
        one_line_error(RunError, "checkpoint", str(tmp_path), "File too large"),
    ):
        train_and_evaluate(config, tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.newest(state_like(config)).step == 4
    assert train_and_evaluate(config, tmp_path)["steps"] == 12


def test_a_teacher_from_a_file_and_no_data(tmp_path, monkeypatch, finished, caplog):
    """The main use: a checkpoint in PyTorch's names and layout is all there is."""

    def refuse(*_):
        raise AssertionError("data were asked for")

    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(granq_jax.modes.opening, "load_split", refuse)
    monkeypatch.setattr(granq_jax.modes.train, "run_page", fail)
    flax_layout = flatten_dict(load_torch("resnet8_digits", finished[0] / "teacher.safetensors"))
    tensors = {
        torch_name("resnet8_digits", path): value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        for path, value in flax_layout.items()
    }
    np.savez(tmp_path / "teacher.npz", **tensors)
    config = tiny_config(**{"eval": "none", "teacher": str(tmp_path / "teacher.npz")})
    result = train_and_evaluate(config, tmp_path / "run")
    assert result["teacher_top1"] is result["student_top1_before"] is result["best_step"] is None
    assert result["eval_examples"] == 0
    # A run is not lost over its report.
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert "no ink" in caplog.text
    assert "granq_jax.report" in caplog.text
    ours, theirs = (
        [line["loss_g"] for line in metrics_of(workdir) if "loss_g" in line]
        for workdir in (tmp_path / "run", finished[0])
    )
    assert ours == theirs
    with one_line_error(ValueError, "config.eval", "'none'"):
        evaluate_run(load_config(tmp_path / "run" / "config.json"), tmp_path / "run")


def test_a_failure_of_the_run_itself_is_not_taken_for_bad_input(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("deep inside")

    monkeypatch.setattr(granq_jax.modes.train, "JointRun", fail)
    with pytest.raises(ValueError, match="deep inside") as caught:
        train_and_evaluate(tiny_config(eval="none"), tmp_path)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, ("config.quant.act_bits", "12"), {"quant.act_bits": 12}),
        (ValueError, ("config.teacher", "not set", "'train'"), {"teacher": ""}),
        (FileNotFoundError, ("config.teacher", "none.npz"), {"teacher": "none.npz"}),
        (
            ValueError,
            ("config.data_dir", "cifar10", "--config.eval=none"),
            {"dataset": "cifar10", "network": "resnet20_cifar10", "data_dir": "/nowhere"},
        ),
        (ValueError, ("teacher_training.batch_size", "2000", "1437"), {"teacher_training.batch_size": 2000}),
        (ValueError, ("config.profile", "12"), {"profile.start": 10, "profile.steps": 5}),
        (ValueError, ("config.quant.impl", "'pallas'", "cpu"), {"quant.impl": "pallas"}),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, error, words, changes):
    workdir = tmp_path / "run"
    with one_line_error(error, *words):
        train_and_evaluate(tiny_config(**changes), workdir)
    assert not workdir.exists()


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with one_line_error(ValueError, "workdir", "is a file"):
        train_and_evaluate(tiny_config(), tmp_path / "file")


def test_a_run_without_checkpoints_cannot_be_evaluated(tmp_path):
    with one_line_error(ValueError, "workdir", "no checkpoint"):
        evaluate_run(tiny_config(), tmp_path, "student")
