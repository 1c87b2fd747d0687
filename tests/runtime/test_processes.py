"""Several processes: what they agree on, and what they compute together. In processes of their own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest

from granq_jax.runtime.processes import check_alike, from_first, is_first, join, together
from tests.conftest import one_line_error
from tests.modes.test_resume import assert_equal_runs, command

COMMAND = [sys.executable, "-m", "granq_jax.main"]

TALK = """
import sys
from granq_jax.errors import InputError
from granq_jax.runtime.processes import check_alike, from_first, is_first, join, together

address, process = sys.argv[1], int(sys.argv[2])
join(address, 2, process)
import jax
import numpy as np

assert jax.process_count() == 2 and len(jax.devices()) == 4

tree = {"a": np.arange(3.0) - 1, "b": {"c": np.float64(process)}, "d": -0.0, "e": None, "f": "text"}
got = from_first(lambda: tree if process == 0 else 1 / 0)
assert got["a"].tolist() == [-1, 0, 1] and got["b"]["c"] == 0 and (got["e"], got["f"]) == (None, "text")
assert np.signbit(got["d"])

def message(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def block(failing, error):
    with together():
        if process == failing:
            raise error

def both(*messages):
    return messages[process]

assert message(block, None, None) is None
assert message(block, 1, OSError("full")) == both("RunError: process 1: full", "OSError: full")
assert message(block, 0, KeyError()) == both("KeyError: ", "RunError: process 0: KeyError")
def fail():
    raise InputError("mine")
assert message(from_first, fail) == both("InputError: mine", "InputError: process 0: mine")
check_alike({"config.a": (1, 2), "config.b": "x"})
refused = message(check_alike, {"config.a": 1, "config.b": process})
assert refused == (
    "InputError: config.b: got 0 in process 0 and 1 in process 1, allowed is the same value in every process"
), refused
assert "config.c: got nothing in process 0 and 1" in message(check_alike, {"config.c": 1} if process else {})
print("said all")
"""


def free_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def start(commands, directory, devices=2, environments=({}, {})):
    """Processes of ``devices`` virtual devices each; what they say is in ``directory/PROCESS.txt``."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    directory.mkdir(parents=True, exist_ok=True)
    running = []
    for process, (line, own) in enumerate(zip(commands, environments, strict=True)):
        with (directory / f"{process}.txt").open("w") as file:
            running.append(subprocess.Popen(line, env=environment | own, stdout=file, stderr=subprocess.STDOUT))
    return running


def finish(running, directory, timeout=120):
    """Waits for the processes; returns their exit statuses and what they said."""
    try:
        statuses = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return statuses, [(directory / f"{process}.txt").read_text() for process in range(len(running))]


def flags(address, process):
    return [f"--coordinator-address={address}", "--num-processes=2", f"--process-id={process}"]


@pytest.mark.slow
def test_what_is_said_between_processes(tmp_path):
    address = free_address()
    running = start([[sys.executable, "-c", TALK, address, str(process)] for process in (0, 1)], tmp_path)
    statuses, outputs = finish(running, tmp_path)
    assert statuses == [0, 0], outputs
    assert all("said all" in output for output in outputs)


def slurm(address, process):
    """What Slurm tells each process that it starts."""
    host, port = address.split(":")
    task = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    return {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": host, "JAX_COORDINATOR_PORT": port, **task}


def test_a_config_that_differs_is_refused_by_every_process_and_writes_nothing(tmp_path):
    address, workdir = free_address(), tmp_path / "run"
    commands = [
        [*COMMAND, "--config=digits_w2a2", f"--workdir={workdir}", f"--config.seed={process}", "--distributed"]
        for process in (0, 1)
    ]
    environments = [slurm(address, process) for process in (0, 1)]
    statuses, outputs = finish(start(commands, tmp_path, environments=environments), tmp_path)
    assert statuses == [2, 2], outputs
    for output in outputs:
        assert "error: config.seed: got 0 in process 0 and 1 in process 1" in output
        assert "Traceback" not in output
    assert not workdir.exists()


def test_one_process_alone_talks_to_nobody():
    assert is_first()
    check_alike({"config.seed": 0})
    assert from_first(lambda: (1, "as it is")) == (1, "as it is")
    with pytest.raises(ZeroDivisionError), together():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("here", 2, 0), ("--coordinator-address", "'here'", "HOST:PORT")),
        (("here:99999", 2, 0), ("--coordinator-address", "99999")),
        (("here:1", 0, 0), ("--num-processes", "0", "from 1")),
        (("here:1", 2, 2), ("--process-id", "2", "below 2")),
        (("here:1", None, -1), ("--process-id", "-1")),
    ],
)
def test_what_cannot_be_joined_is_refused(arguments, words):
    with one_line_error(ValueError, *words):
        join(*arguments)


def test_unequal_numbers_of_devices_are_refused(monkeypatch):
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 0, 1)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with one_line_error(ValueError, "devices", "[2, 1]", "equal numbers"):
        check_alike({})


def test_what_no_cluster_tells_must_be_given(tmp_path):
    line = [*COMMAND, "--config=digits_w2a2", f"--workdir={tmp_path / 'run'}"]
    commands = [[*line, "--distributed"], [*line, "--coordinator-address=127.0.0.1:1", "--num-processes=2"]]
    statuses, outputs = finish(start(commands, tmp_path), tmp_path)
    assert statuses == [2, 2]
    missing = ["--coordinator-address, --num-processes, --process-id", "--process-id"]
    for output, flag in zip(outputs, missing, strict=True):
        assert f"error: {flag}: not given, and JAX finds no cluster" in output


SETTINGS = {
    **{"epochs": 3, "steps_per_epoch": 6, "warmup_epochs": 1, "decay_epochs": (2,), "batch_size": 8},
    **{"eval_every_epochs": 2, "checkpoint_every_epochs": 1, "log_every_steps": 4},
    **{"teacher_training.epochs": 1},
}

# The same command, but that the process sends itself a signal before a step.
INTERRUPTED = [
    sys.executable,
    "-c",
    """
import os, sys
from granq_jax.distill.joint_run import JointRun
from granq_jax.main import main

number, before_step = int(sys.argv[1]), int(sys.argv[2])
advance = JointRun.advance

def interrupted(self, warmup):
    if self.step + 1 == before_step:
        os.kill(os.getpid(), number)
    return advance(self, warmup)

JointRun.advance = interrupted
sys.exit(main(sys.argv[3:]))
""",
]


def pair(workdir, *arguments):
    address = free_address()
    return [command(workdir, *flags(address, process), *arguments, **SETTINGS) for process in (0, 1)]


def interrupt(workdir, process, number, before_step):
    """Trains until one process gets a signal; returns exit statuses and what was said."""
    commands = pair(workdir)
    commands[process] = [*INTERRUPTED, str(int(number)), str(before_step), *commands[process][len(COMMAND) :]]
    return finish(start(commands, workdir.parent), workdir.parent, timeout=300)


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_killed_end_as_if_they_never_were(tmp_path):
    undisturbed, workdir = tmp_path / "undisturbed" / "run", tmp_path / "disturbed" / "run"
    statuses, outputs = finish(start(pair(undisturbed), undisturbed.parent), undisturbed.parent, timeout=300)
    assert statuses == [0, 0], outputs
    assert [output.count('"student_top1"') for output in outputs] == [1, 0]  # the result is printed once
    result = json.loads((undisturbed / "result.json").read_text())
    assert (result["processes"], len(result["devices"])) == (2, 4)

    statuses, outputs = interrupt(workdir, 1, signal.SIGTERM, 3)
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    assert all("interrupted by SIGTERM after step 4, which is saved" in output for output in outputs)

    for killed, before_step in ((1, 9), (0, 15)):
        start_time = time.monotonic()
        statuses, outputs = interrupt(workdir, killed, signal.SIGKILL, before_step)
        assert statuses[killed] == -signal.SIGKILL
        assert statuses[1 - killed] not in (0, 2)
        # Told by us where a computation fails, and by JAX where it would hang.
        assert re.search("another one has ended|another task died", outputs[1 - killed]), outputs
        print(f"process {killed} killed; in all {time.monotonic() - start_time:.0f} s")
        assert not (workdir / "result.json").exists()

    statuses, outputs = finish(start(pair(workdir), workdir.parent), workdir.parent, timeout=300)
    assert statuses == [0, 0], outputs
    assert "goes on after step 12 of 18" in outputs[0]
    assert_equal_runs(workdir, undisturbed)

    statuses, outputs = finish(start(pair(workdir, "--mode=evaluate"), tmp_path), tmp_path, timeout=300)
    assert statuses == [0, 0], outputs
    assert json.loads((workdir / "evaluation.json").read_text())["student_top1"] == result["student_top1"]
