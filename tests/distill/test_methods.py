"""Every method, by its name, through the whole loop."""

import json

import jax
import numpy as np
import pytest

from granq_jax import load_config, train_and_evaluate
from granq_jax.config import check_config, config_names, flat, make_trainer
from granq_jax.distill.methods import METHODS, set_method
from granq_jax.export import load_packed
from granq_jax.main import main
from granq_jax.modes.evaluate import evaluate_run
from granq_jax.modes.export import export_run
from granq_jax.quant import RANGES
from granq_jax.runs.checkpoint import Checkpoints
from granq_jax.teachers.load import load_teacher
from tests.conftest import one_line_error
from tests.modes.test_train import metrics_of, state_like, tiny_config


def test_every_config_takes_every_method():
    for name in config_names():
        for method in METHODS:
            config = load_config(name)
            set_method(config, method)
            check_config(config)
            make_trainer(config)


@pytest.mark.parametrize("before", METHODS)
def test_a_method_takes_the_place_of_another(before):
    for method in METHODS:
        config, fresh = load_config("paper/cifar10_w3a3"), load_config("paper/cifar10_w3a3")
        set_method(config, before)
        config.loss.gamma, config.student.lr = 1.0, 1e-4  # what a method leaves to the config
        for one in (config, fresh):
            set_method(one, method)
        assert dict(flat(config)) == dict(flat(fresh))


def test_an_unknown_method_is_refused():
    with one_line_error(ValueError, "method", "'dfq'", "'granq'", "'akt'"):
        set_method(load_config("digits_w2a2"), "dfq")


def test_a_config_without_all_settings_takes_a_method_or_says_why_not():
    config = load_config("paper/cifar10_w3a3")
    with config.unlocked():
        del config.loss.objective
    set_method(config, "gdfq")
    assert config.loss.objective == "gdfq"
    with config.unlocked():
        del config.quant
        config.quant = 3
    with one_line_error(ValueError, "method", "'gdfq'"):
        set_method(config, "gdfq")


def test_the_command_takes_a_method_and_what_is_said_beside_it_wins(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setitem(
        main.__globals__["MODES"], "train", lambda config, workdir, **_: seen.update(flat(config)) or {}
    )
    arguments = ["--config", "digits_w2a2", "--workdir", str(tmp_path / "run"), "--compilation-cache=off"]
    assert main([*arguments, "--method", "gdfq", "--config.loss.gamma=0.5"]) == 0
    assert (seen["loss.objective"], seen["loss.gamma"], seen["quant.act_ranges"]) == ("gdfq", 0.5, "moving_average")
    assert main([*arguments, "--method", "zeroq"]) == 2
    assert "--method" in capsys.readouterr().err
    assert main(["--workdir", str(tmp_path), "--mode", "export", "--method", "akt"]) == 2
    assert "--method: got 'akt', allowed with --mode=train or profile only" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value"), [("quant.act_granularity", "sample"), ("warmup_epochs", 0)])
def test_settings_that_do_not_go_together_are_refused(field, value):
    config = tiny_config()
    set_method(config, "adadfq")
    config.update_from_flattened_dict({field: value})
    with one_line_error(ValueError, f"config.{field}", repr(value), "moving_average", "allowed are"):
        check_config(config)


def run(workdir, method, **changes):
    config = tiny_config(**changes)
    set_method(config, method)
    return config, train_and_evaluate(config, workdir)


def student_of(config, workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.newest(state_like(config)).state.student


@pytest.mark.slow
@pytest.mark.parametrize("method", ["granq", "gdfq", "akt"])
def test_a_run_goes_on_is_evaluated_and_exported(tmp_path, method):
    config, whole = run(tmp_path / "whole", method)
    assert whole["act_ranges"] == config.quant.act_ranges
    assert np.isfinite([line["loss_s"] for line in metrics_of(tmp_path / "whole") if "loss_s" in line]).all()

    run(tmp_path / "parts", method, epochs=2)
    _, parts = run(tmp_path / "parts", method)
    assert parts["student_top1"] == whole["student_top1"]
    student = student_of(config, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, student, student_of(config, tmp_path / "parts"))
    assert (RANGES in student) == (method != "granq")

    assert evaluate_run(config, tmp_path / "whole")["student_top1"] == whole["student_top1"]
    export_run(config, tmp_path / "whole")
    packed = load_packed(tmp_path / "whole" / "export" / "student.safetensors")
    if method != "granq":
        jax.tree.map(np.testing.assert_array_equal, packed.variables[RANGES], student[RANGES])
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["quant"]["act_ranges"] == config.quant.act_ranges


@pytest.mark.slow
def test_calibration_leaves_the_weights_alone(tmp_path):
    config, _ = run(tmp_path, "calibration")
    config.teacher = str(tmp_path / "teacher.safetensors")
    teacher = jax.device_get(load_teacher(config, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, student_of(config, tmp_path)["params"], teacher["params"])
