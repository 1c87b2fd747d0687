"""Runs that are stopped, killed and damaged, and go on as if nothing had been."""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from granq_jax import load_config
from granq_jax.config import make_trainer
from granq_jax.runs.checkpoint import Checkpoints
from granq_jax.teachers.load import load_teacher

# What a run measures of itself: time, memory.
MEASURED = ("seconds_per_step", "compile_seconds", "peak_rss_mb")
SETTINGS = {
    **{"epochs": 5, "steps_per_epoch": 40, "warmup_epochs": 1, "decay_epochs": (3,), "batch_size": 16},
    **{"eval_every_epochs": 2, "checkpoint_every_epochs": 1, "log_every_steps": 9},
    **{"teacher_training.epochs": 3, "student.ema_decay": 0.9, "student.schedule": "steps"},
}


def command(workdir, *arguments, **settings):
    cache = jax.config.jax_compilation_cache_dir  # restarts share compiled programs, as they do by default
    settings = [f"--config.{key}={value}" for key, value in (SETTINGS | settings).items()]
    arguments = (f"--workdir={workdir}", f"--compilation-cache={cache}", *settings, *arguments)
    return [sys.executable, "-m", "granq_jax.main", "--config=digits_w2a2", *arguments]


def complete(workdir, *arguments, status=0, **settings):
    """Runs the command to its end, and returns what it said."""
    process = subprocess.run(command(workdir, *arguments, **settings), capture_output=True, text=True, timeout=300)
    assert process.returncode == status, process.stderr
    return process.stderr


def newest(workdir):
    config = load_config(workdir / "config.json")
    like = make_trainer(config).state_shapes(load_teacher(config, workdir))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.newest(like)


def assert_equal_runs(ours, theirs):
    """Everything but time is equal, bit for bit."""
    a, b = newest(ours), newest(theirs)
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.state, b.state)
    lines = []
    for workdir in (ours, theirs):
        result = json.loads((workdir / "result.json").read_text())
        metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        seconds = [line.pop("seconds") for line in metrics if "seconds" in line]
        assert seconds == sorted(seconds)
        lines.append((metrics, {key: value for key, value in result.items() if key not in MEASURED}))
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(workdir)
    return workdir


def lines_in(workdir):
    """Lines of metrics, those of the teacher's training included: how far a run is."""
    logs = [workdir / "teacher_training" / "metrics.jsonl", workdir / "metrics.jsonl"]
    return sum(log.read_bytes().count(b"\n") for log in logs if log.exists())


def holds_lock(pid, workdir):
    lock = workdir / "run.lock"
    return lock.exists() and f"process {pid} on " in lock.read_text()


def kill(workdir, signum, lines, delay):
    """Runs until so many lines are written, then for ``delay`` seconds or until it writes a checkpoint."""
    with (workdir.parent / "stderr").open("w+") as stderr:
        process = subprocess.Popen(command(workdir), stdout=subprocess.DEVNULL, stderr=stderr)
        while process.poll() is None and not holds_lock(process.pid, workdir):  # before that, signals are Python's
            time.sleep(0.001)
        while process.poll() is None and lines_in(workdir) < lines:
            time.sleep(0.001)
        if delay is not None:
            time.sleep(delay)
        else:
            while process.poll() is None and not any((workdir / "checkpoints").glob("*tmp*")):
                time.sleep(0.001)
        process.send_signal(signum)
        status = process.wait(60)
        stderr.seek(0)
        return status, stderr.read()


@pytest.mark.slow
def test_a_run_ended_at_five_random_moments_goes_on_as_if_it_never_was(undisturbed, tmp_path):
    seed = random.randrange(2**32)
    random_moments = random.Random(seed)
    workdir = tmp_path / "run"
    for i, signum in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)):
        lines = int(lines_in(undisturbed) * (i + random_moments.random()) / 5)
        delay = None if i == 3 else random_moments.uniform(0, 0.3)
        status, said = kill(workdir, signum, lines, delay)
        last = "".join(said.splitlines()[-1:])
        print(f"seed {seed}, {signum.name} {i} at {lines_in(workdir)} lines: {status} {last}")
        if signum == signal.SIGTERM and status == 128 + signum:
            assert last.startswith("interrupted by SIGTERM")
        else:
            came_too_late = i > 2 and (workdir / "result.json").exists()
            assert came_too_late or (signum, status) == (signal.SIGKILL, -signal.SIGKILL)
    print(complete(workdir).splitlines()[-1])
    assert_equal_runs(workdir, undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_which_goes_on_when_there_is_room(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    complete(workdir, epochs=2)
    # A file size limit (in KiB) is to a process what a full disk is, and needs neither root nor a disk.
    limited = ["bash", "-c", 'ulimit -f 30 && exec "$@"', "--", *command(workdir)]
    process = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large" in last
    assert "Traceback" not in process.stderr
    assert newest(workdir).step == 80
    complete(workdir)
    assert_equal_runs(workdir, undisturbed)


@pytest.mark.slow
def test_a_run_that_diverges_says_where(tmp_path):
    said = complete(tmp_path / "run", status=1, **{"generator.lr": 1e38}).splitlines()[-1]
    assert said.startswith("error: step 2: the loss term ")
    assert "not finite; the newest checkpoint is of step 0" in said
