"""Who may use a run's directory, and what may be there."""

import json
import os

import pytest

from granq_jax import train_and_evaluate
from granq_jax.config import CHECKS
from granq_jax.modes.train_teacher import train_teacher
from granq_jax.runs.record import record_start
from granq_jax.runs.workdir import (
    MAY_CHANGE,
    check_workdir,
    finished_result,
    locked,
    note_config,
    remove_run,
    teacher_is_of_run,
)
from tests.conftest import one_line_error
from tests.digits import digits


def config_with(**changes):
    config = digits()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def begun(tmp_path):
    note_config(config_with(), tmp_path)
    return tmp_path


def test_a_second_process_is_refused(tmp_path):
    def lock_again():
        with locked(tmp_path / "run"):
            pass

    with locked(tmp_path / "run"), one_line_error(ValueError, "workdir", "run", "in use by process"):
        lock_again()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("key", "begun_with", "asked"),
    [
        ("seed", "0", 1),
        ("batch_size", "64", 32),
        ("quant.act_bits", "3", 4),
        ("student.lr", "0.001", 0.01),
        ("decay_epochs", "(100, 200, 300)", (5,)),
        ("eval_batch_size", "120", 60),
        ("teacher_training.epochs", "40", 41),
    ],
)
def test_settings_that_make_another_run_are_refused(begun, key, begun_with, asked):
    with one_line_error(ValueError, f"config.{key}: got {asked!r}", begun_with, str(begun), "--overwrite"):
        check_workdir(config_with(**{key: asked}), begun)
    check_workdir(config_with(**{key: asked}), begun, overwrite=True)


def test_other_settings_may_change(begun):
    assert set(CHECKS) >= MAY_CHANGE
    check_workdir(config_with(**{"log_every_steps": 1, "epochs": 99, "keep_best": False, "profile.steps": 2}), begun)


def test_a_run_is_not_gone_on_with_unless_wanted(begun):
    with one_line_error(ValueError, "already holds a run", "config.resume", "--overwrite"):
        check_workdir(config_with(resume=False), begun)
    check_workdir(config_with(resume=False), begun / "new")


def test_remains_without_a_config_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    check_workdir(config_with(), tmp_path)  # killed before it began
    (tmp_path / "checkpoints" / "20").mkdir()
    with one_line_error(ValueError, "checkpoints/20", "config.json"):
        check_workdir(config_with(), tmp_path)


def test_only_a_runs_own_files_are_removed(begun):
    for name in ("metrics.jsonl", "result.json", "evaluation.json", "teacher.safetensors", "notes.txt"):
        (begun / name).touch()
    for name in ("checkpoints/20", "profile", "teacher_training", "figures"):
        (begun / name).mkdir(parents=True)
    (begun / "teacher.json").touch()  # of --mode train_teacher
    assert not teacher_is_of_run(begun)
    remove_run(begun, and_teacher=False)
    left = {"notes.txt", "figures", "teacher.json", "teacher.safetensors", "teacher_training"}
    assert {path.name for path in begun.iterdir()} == left
    note_config(config_with(), begun)
    (begun / "teacher.json").unlink()
    assert teacher_is_of_run(begun)
    with one_line_error(ValueError, "workdir", str(begun), "already holds a teacher"):
        train_teacher(config_with(), begun)
    remove_run(begun, and_teacher=True)
    assert {path.name for path in begun.iterdir()} == {"notes.txt", "figures"}


def test_a_directory_elsewhere_is_left_alone(begun, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("scratch")
    (elsewhere / "20").mkdir()
    (begun / "checkpoints").symlink_to(elsewhere)
    remove_run(begun, and_teacher=False)
    assert not os.listdir(begun)
    assert os.listdir(elsewhere) == ["20"]


@pytest.mark.parametrize("name", ["config.json", "checkpoints/epoch3.ckpt"])
def test_files_that_no_run_wrote_are_not_replaced(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"theme": "dark"}')
    words = (name.partition("/")[0], "nothing says that a run wrote it")
    with one_line_error(ValueError, "workdir", str(tmp_path), *words):
        train_and_evaluate(config_with(), tmp_path, overwrite=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize(
    ("beside", "content"),
    [
        ("run.lock", "process 7 on a machine"),
        ("run.lock", ""),
        ("starts.jsonl", ""),
        ("starts.jsonl", '{"time": "now"}'),
        ("starts.jsonl", '{"versions": {"another": "1.0"}}'),
        ("starts.jsonl", "[1]"),
    ],
)
def test_names_that_others_use_too_prove_nothing(tmp_path, beside, content):
    (tmp_path / beside).write_text(content)
    (tmp_path / "metrics.jsonl").write_text("of somebody else")
    with one_line_error(ValueError, "workdir", "metrics.jsonl", "nothing says that a run wrote it"):
        check_workdir(config_with(), tmp_path, overwrite=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "of somebody else"


@pytest.mark.parametrize("config", [None, "{"], ids=["none", "damaged"])
def test_a_run_is_known_by_its_record_of_starts_too(tmp_path, config):
    record_start(tmp_path, "a command")
    (tmp_path / "metrics.jsonl").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    check_workdir(config_with(), tmp_path, overwrite=True)


def test_what_other_modes_leave_is_replaced(tmp_path):
    (tmp_path / "evaluation.json").touch()  # of a teacher
    (tmp_path / "checkpoints").mkdir()
    check_workdir(config_with(), tmp_path, overwrite=True)


@pytest.mark.parametrize("trained", ["teacher.safetensors", "teacher_training"])
def test_nothing_is_removed_if_the_teacher_there_cannot_be_used(begun, trained):
    settings = json.dumps({"seed": 0})
    (begun / "teacher_training").mkdir()
    (begun / "teacher_training" / "settings.json").write_text(settings)
    for name in ("teacher.json", "metrics.jsonl", trained):
        if trained != "teacher_training" or name != trained:
            (begun / name).touch()
    before = set(os.listdir(begun))
    with one_line_error(ValueError, "workdir", str(begun), "a teacher trained with"):
        train_and_evaluate(config_with(seed=1), begun, overwrite=True)
    assert set(os.listdir(begun)) == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(begun):
    config = config_with()
    result = {"steps": config.epochs * config.steps_per_epoch, "teacher": config.teacher}
    (begun / "result.json").write_text(json.dumps(result))
    check_workdir(config, begun)
    assert finished_result(config, begun) == result
    for changes in ({"epochs": config.epochs + 1}, {"teacher": "other.npz"}):
        assert finished_result(config_with(**changes), begun) is None
        with one_line_error(ValueError, "workdir", str(begun), "result.json", "no checkpoint", "--overwrite"):
            check_workdir(config_with(**changes), begun)
    (begun / "checkpoints" / "2000").mkdir(parents=True)
    check_workdir(config_with(epochs=config.epochs + 1), begun)


@pytest.mark.parametrize("content", ["null", "[]", "{", "{}"])
def test_a_damaged_result_is_none(begun, content):
    (begun / "result.json").write_text(content)
    assert finished_result(config_with(), begun) is None
