import asyncio
import gc
import json
import signal
import subprocess
import sys

import jax
import pytest

from granq_jax import main as command
from granq_jax.errors import RunError
from granq_jax.main import main
from granq_jax.runtime.stopping import Interrupted


@pytest.fixture
def calls(monkeypatch):
    """Records (config, workdir) of each mode instead of running it."""
    seen = []
    for mode in command.MODES:
        monkeypatch.setitem(command.MODES, mode, lambda config, workdir, **_: seen.append((config, workdir)) or {})
    return seen


def test_settings_are_overridden_and_typed(calls, tmp_path):
    arguments = ["--config.quant.weight_bits=4", "--config.student.lr=0.5", "--config.decay_epochs=(7, 9)"]
    assert main(["--config", "digits_w2a2", "--workdir", str(tmp_path), "--config.teacher=a.npz", *arguments]) == 0
    ((config, workdir),) = calls
    assert (config.quant.weight_bits, config.student.lr, config.decay_epochs) == (4, 0.5, (7, 9))
    assert config.teacher == "a.npz"
    assert workdir == tmp_path


def test_the_command_is_put_on_record(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setitem(command.MODES, "train", lambda config, workdir, command, **_: seen.append(command) or {})
    arguments = ["--config", "digits_w2a2", "--workdir", f"{tmp_path}/a b"]
    assert main(arguments) == 0
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "granq_jax.main", *arguments])
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    assert main() == 0
    typed = f"--config digits_w2a2 --workdir '{tmp_path}/a b'"
    assert seen == [f"granq_jax.main {typed}", f"python -m granq_jax.main {typed}"]


def test_the_workdir_is_named_after_the_config(calls):
    for mode in ([], ["--mode=train_teacher"], ["--mode=profile"]):
        assert main(["--config=configs/digits_w2a2.py", *mode]) == 0
    assert [str(workdir) for _, workdir in calls] == [
        "runs/digits_w2a2",
        "runs/digits_w2a2_teacher",
        "runs/digits_w2a2_profile",
    ]


def test_a_run_is_evaluated_with_its_own_settings(calls, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quant": {"act_bits": 7}}))
    for config in ([], ["--config=digits_w2a2"]):
        main(["--mode=evaluate", f"--workdir={tmp_path}", *config, "--config.data_dir=here"])
    for config, _ in calls:
        assert (config.quant.act_bits, config.data_dir) == (7, "here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config", "not given"]),
        (["--config=nothing"], ["config", "'nothing'", "digits_w2a2"]),
        (["--config=digits_w2a2", "--config.quant.bits=3"], ["quant.bits"]),
        (["--config=digits_w2a2", "--config.quant.act_bits=three"], ["quant.act_bits", "three"]),
        (["--config=digits_w2a2", "--config.quant.act_bits=9"], ["config.quant.act_bits", "9", "2 to 8"]),
        (["--config=digits_w2a2", "--steps=9"], ["steps"]),
        (["--config=digits_w2a2", "9"], ["arguments", "9"]),
        (["--config=digits_w2a2", "--subject=both"], ["--subject", "'both'", "--mode=evaluate"]),
        (["--config=digits_w2a2", "--overwrite", "--mode=train_teacher"], ["--overwrite", "--mode=train"]),
        (["--config=digits_w2a2", "--compilation-cache=/dev/null/a"], ["--compilation-cache", "/dev/null/a", "off"]),
        (["--mode=evaluate", "--workdir=nowhere"], ["--workdir", "'nowhere'"]),
        (["--mode=evaluate", "--config=digits_w2a2", "--workdir=nowhere"], ["config.teacher", "'nowhere'"]),
    ],
)
def test_bad_input_exits_with_2_and_one_line(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ends", "status", "line"),
    [
        (RunError("step 3: no good"), 1, "error: step 3: no good"),
        (Interrupted(signal.SIGTERM, " after step 3"), 143, "interrupted by SIGTERM after step 3"),
        (Interrupted(signal.SIGINT), 130, "interrupted by SIGINT"),
    ],
)
def test_a_run_that_ends_early_says_so_in_one_line(capsys, monkeypatch, ends, status, line):
    def end(*_, **__):
        raise ends

    monkeypatch.setitem(command.MODES, "train", end)
    assert main(["--config=digits_w2a2"]) == status
    assert capsys.readouterr() == ("", line + "\n")


def test_errors_that_a_library_has_left_behind_do_not_follow_the_line(capsys, monkeypatch):
    """Orbax writes arrays in tasks, and asks the first that fails for its error; asyncio logs those of the others."""

    async def fail():
        raise ValueError("left behind")

    async def write():
        tasks = [asyncio.create_task(fail()) for _ in range(3)]
        await asyncio.wait(tasks)
        await tasks[0]

    def stop(*_, **__):
        try:
            asyncio.run(write())
        except ValueError as error:
            raise RunError("the disk is full") from error

    monkeypatch.setitem(command.MODES, "train", stop)
    assert main(["--config=digits_w2a2"]) == 1
    gc.collect()
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_a_signal_ends_any_mode(capsys, monkeypatch):
    monkeypatch.setitem(command.MODES, "train_teacher", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["--config=digits_w2a2", "--mode=train_teacher"]) == 143
    assert capsys.readouterr().err == "interrupted by SIGTERM\n"


def test_the_command_itself_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "granq_jax.main", "--config=cifar10_w3a3", "--mode=invent"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert "--mode" in finished.stderr.splitlines()[-1]


@pytest.fixture
def cache_settings():
    """Puts JAX's settings back after the test."""
    names = [
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_where_asked(calls, cache_settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    told = jax.config.jax_compilation_cache_dir
    assert main(["--config=digits_w2a2"]) == 0
    assert jax.config.jax_compilation_cache_dir == told  # what JAX was told stays

    jax.config.update("jax_compilation_cache_dir", None)
    assert main(["--config=digits_w2a2"]) == 0
    (kept,) = (tmp_path / "user" / "granq-jax" / "compiled").iterdir()
    assert jax.config.jax_compilation_cache_dir == str(kept)
    assert jax.config.jax_compilation_cache_max_size > 0

    monkeypatch.chdir(tmp_path)
    assert main(["--config=digits_w2a2", "--compilation-cache=here"]) == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here")

    assert main(["--config=digits_w2a2", "--compilation-cache=off"]) == 0
    assert not jax.config.jax_enable_compilation_cache


def test_a_cache_that_cannot_be_made_is_done_without(calls, cache_settings, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert main(["--config=digits_w2a2"]) == 0
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("mode", command.MODES)
def test_a_fault_of_the_package_is_not_taken_for_bad_input(monkeypatch, tmp_path, mode):
    def fail(*_, **__):
        raise ValueError("deep inside")

    monkeypatch.setitem(command.MODES, mode, fail)
    with pytest.raises(ValueError, match="deep inside"):
        main([f"--mode={mode}", "--config=digits_w2a2", f"--workdir={tmp_path}"])
