import json

import pytest

from granq_jax.main import main
from granq_jax.modes.profile import costliest, read_events
from tests.report.run_files import write_run


def event(name, thread, start, duration, **more):
    return {"ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": duration, "args": {"hlo_op": name}, **more}


def test_times_are_added_up_over_threads_and_what_is_within_is_not_counted_twice():
    events = [
        event("dot", 1, 0, 100),
        event("dot", 2, 10, 80),  # at the same time, on another thread
        event("while", 1, 200, 100),
        event("add", 1, 210, 30),
        event("add", 1, 250, 20),
        event("call", 1, 255, 5),
        {"ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 1000, "name": "python", "args": {}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "a"}},
        {},
    ]
    ops = [(op.name, op.calls, round(op.seconds * 1e6)) for op in costliest(events)]
    assert ops == [("dot", 2, 180), ("while", 1, 50), ("add", 2, 45), ("call", 1, 5)]


@pytest.mark.slow
def test_the_mode_prints_ten_ops_and_leaves_a_trace(tmp_path, capsys):
    write_run(tmp_path / "run")
    teacher = tmp_path / "run" / "given.safetensors"
    workdir = tmp_path / "profiled"
    arguments = ["--config=digits_w2a2", "--mode=profile", f"--workdir={workdir}", f"--config.teacher={teacher}"]
    # The settings of the tests of whole runs, whose program needs to be compiled only once then.
    arguments += ["--config.batch_size=8", "--config.epochs=3", "--config.steps_per_epoch=4"]
    arguments += ["--config.warmup_epochs=1", "--config.decay_epochs=(2,)"]
    assert main([*arguments, "--config.profile.steps=2"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result == json.loads((workdir / "profile.json").read_text())
    seconds = [op["seconds_per_step"] for op in result["ops"]]
    assert len(seconds) == 10
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) < result["op_seconds_per_step"]
    table = [line.split() for line in printed.err.splitlines() if " % " in line]
    assert [line[4] for line in table] == [op["name"] for op in result["ops"]]
    assert [float(line[0]) for line in table] == pytest.approx([second * 1e3 for second in seconds], abs=0.006)
    assert any("Generator" in op["source"] or "ResNet" in op["source"] for op in result["ops"])
    assert "summed over threads" in printed.err
    events = read_events(workdir / "profile" / result["trace"].partition("profiled/profile/")[2])
    assert sum(event.get("name") == "joint_step" for event in events) == 2
