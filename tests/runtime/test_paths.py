"""Paths that begin with a tilde: of the home, wherever they are given, and never of a folder of that name."""

import os

import jax
import numpy as np
import pytest

from granq_jax import QuantSpec, load_config, train_and_evaluate
from granq_jax import main as command
from granq_jax.data.datasets import load_split
from granq_jax.export import load_packed, save_packed
from granq_jax.modes.evaluate import evaluate_run
from granq_jax.modes.profile import profile
from granq_jax.modes.train_teacher import train_teacher
from granq_jax.report import read_run
from granq_jax.report.__main__ import main as report
from granq_jax.runtime.compilation_cache import use_compilation_cache
from granq_jax.runtime.paths import expanded
from granq_jax.teachers.load import check_teacher
from granq_jax.teachers.zoo import fetch
from tests.conftest import one_line_error

NOBODY = "~nobody-of-that-name/a"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home, and another directory to be in, in which nothing may appear."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", os.fspath(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert os.listdir(tmp_path / "here") == []


def config_with(**changes):
    config = load_config("digits_w2a2")
    config.update_from_flattened_dict(changes)
    return config


def test_only_what_begins_with_a_tilde_is_of_a_home(home):
    assert expanded("~/a/b", "workdir") == home / "a" / "b"
    assert expanded("~", "workdir") == home
    for path in ("a/~/b", "./~/a", "/~a", "a~"):
        assert os.fspath(expanded(path, "workdir")) == os.path.normpath(path)


def test_files_are_read_and_written_there(home):
    variables = {"params": {"head": {"kernel": np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2)}}}
    save_packed("~/a.safetensors", variables, QuantSpec())
    assert (home / "a.safetensors").exists()
    assert load_packed("~/a.safetensors").variables["params"].keys() == {"head"}
    (home / "mine.py").write_text("from granq_jax.config import default_config as get_config")
    assert load_config("~/mine.py").network == "resnet20_cifar10"
    np.savez(home / "cifar10.npz", x_test=np.zeros((2, 32, 32, 3), np.uint8), y_test=np.arange(2))
    assert len(load_split("cifar10", "test", "~")) == 2
    assert len(load_split("cifar10", "test", "~/cifar10.npz")) == 2
    (home / "t.pth").touch()
    check_teacher(config_with(teacher="~/t.pth"))


@pytest.mark.parametrize("told", ["directly", "by JAX's own variable"])
def test_programs_are_kept_there(home, told):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    try:
        if told != "directly":
            jax.config.update("jax_compilation_cache_dir", "~/programs")
        use_compilation_cache("~/programs" if told == "directly" else "")
        assert jax.config.jax_compilation_cache_dir == os.fspath(home / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_compilation_cache_max_size", before[1])


def test_the_command_has_its_directory_there(home, monkeypatch):
    given = []
    monkeypatch.setitem(command.MODES, "train_teacher", lambda config, workdir: given.append(workdir) or {})
    assert command.main(["--config=digits_w2a2", "--mode=train_teacher", "--workdir=~/runs/a"]) == 0
    assert given == [home / "runs" / "a"]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: train_and_evaluate(config_with(eval="none"), NOBODY), "workdir"),
        (lambda: train_teacher(config_with(), NOBODY), "workdir"),
        (lambda: evaluate_run(config_with(), NOBODY), "workdir"),
        (lambda: profile(config_with(), NOBODY), "workdir"),
        (lambda: read_run(NOBODY), "workdir"),
        (lambda: check_teacher(config_with(teacher=NOBODY)), "config.teacher"),
        (lambda: load_config(NOBODY), "config"),
        (lambda: load_split("cifar10", "test", NOBODY), "config.data_dir"),
        (lambda: load_split("image_folder", "test", NOBODY), "config.data_dir"),
        (lambda: save_packed(NOBODY, {"params": {}}, QuantSpec()), "path"),
        (lambda: load_packed(NOBODY), "path"),
        (lambda: use_compilation_cache(NOBODY), "--compilation-cache"),
        (lambda: fetch("resnet18", NOBODY), "cache_dir"),
    ],
)
def test_the_home_of_nobody_is_refused(call, field):
    with one_line_error(ValueError, f"{field}: ", NOBODY, "home"):
        call()


@pytest.mark.parametrize("arguments", [[NOBODY], ["a", f"--output={NOBODY}"]])
def test_the_home_of_nobody_is_refused_by_the_report(arguments, capsys):
    assert report(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert NOBODY in said
