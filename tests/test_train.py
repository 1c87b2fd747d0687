"""Whole runs of a few steps, and what they leave behind."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import granq_jax.train
from granq_jax import load_config, load_torch, report, train_and_evaluate
from granq_jax.build import make_trainer
from granq_jax.checkpoint import Checkpoints
from granq_jax.data import load_split
from granq_jax.evaluate import evaluate_run, float_accuracy
from granq_jax.torch_import import torch_name
from granq_jax.trainer import TrainState
from tests.conftest import one_line_error
from tests.test_metrics import read_events, summaries

RESULT = {
    *("dataset", "eval_examples", "network", "weight_bits", "act_bits", "weight_granularity", "act_granularity"),
    *("teacher_top1", "student_top1_before", "student_top1", "best_top1", "best_step", "steps", "seconds_per_step"),
    *("compile_seconds", "peak_rss_mb", "seed", "devices", "versions", "effective_weight_bits"),
}
TRAIN_LINE = ["step", "epoch", "loss_g", "loss_s", "hinge", "onehot", "bns", "lr_g", "lr_s", "seconds"]


def tiny_config(**changes):
    config = load_config("digits_w3a3")
    config.epochs, config.steps_per_epoch, config.warmup_epochs = 3, 4, 1
    config.batch_size, config.log_every_steps, config.eval_every_epochs = 8, 3, 2
    config.teacher_training.epochs, config.teacher_training.small_epochs = 2, 0
    config.profile.start, config.profile.steps = 2, 3
    config.decay_epochs = (2,)
    config.update_from_flattened_dict(changes)
    return config


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_and_evaluate(tiny_config(), workdir)


def test_the_result(finished):
    workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result.keys() >= RESULT
    assert (result["steps"], result["eval_examples"], result["best_step"] % 4) == (12, 360, 0)
    for subject in ("teacher_{}", "student_{}_before", "student_{}"):
        assert 0 <= result[subject.format("top1")] <= result[subject.format("top5")] <= 100
    assert result["best_top1"] >= result["student_top1"]
    assert 3.0 < result["effective_weight_bits"] < 4.0


def test_the_metrics(finished):
    lines = metrics_of(finished[0])
    training = [line for line in lines if "loss_g" in line]
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


def test_the_trace(finished):
    names = {path.name.split(".", 1)[1] for path in (finished[0] / "profile").rglob("*.*") if path.is_file()}
    assert "xplane.pb" in names  # XProf
    assert "json.gz" in names  # Perfetto


def test_the_report_is_made_again_from_the_files(finished, tmp_path):
    workdir, _ = finished
    assert report.main([str(workdir), f"--output={tmp_path / 'again.html'}"]) == 0
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


def test_a_run_is_reproducible(finished, tmp_path):
    train_and_evaluate(tiny_config(), tmp_path)

    def without_seconds(workdir):
        return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics_of(workdir)]

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
    like = jax.eval_shape(
        lambda: trainer.init(trainer.model.init(jax.random.key(0), np.ones((1, 8, 8, 1), np.float32)))
    )
    with Checkpoints(finished[0]) as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step(), like)
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


def test_a_teacher_from_a_file_and_no_data(tmp_path, monkeypatch, finished, caplog):
    """The main use: a checkpoint in PyTorch's names and layout is all there is."""

    def refuse(*_):
        raise AssertionError("data were asked for")

    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(granq_jax.train, "load_split", refuse)
    monkeypatch.setattr(granq_jax.train, "run_page", fail)
    flax_layout = flatten_dict(load_torch("resnet8_digits", finished[0] / "teacher.safetensors"))
    tensors = {
        torch_name("resnet8_digits", path): value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        for path, value in flax_layout.items()
    }
    np.savez(tmp_path / "teacher.npz", **tensors)
    config = tiny_config(**{"eval": "none", "profile.steps": 0, "teacher": str(tmp_path / "teacher.npz")})
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

    monkeypatch.setattr(granq_jax.train, "JointRun", fail)
    with one_line_error(RuntimeError, str(tmp_path), "deep inside"):
        train_and_evaluate(tiny_config(**{"eval": "none", "profile.steps": 0}), tmp_path)


def test_what_is_there_is_not_overwritten(finished):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with one_line_error(ValueError, "workdir", str(workdir), "already holds a run"):
        train_and_evaluate(tiny_config(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before


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
