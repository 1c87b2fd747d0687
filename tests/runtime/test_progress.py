import contextlib
import io
import sys

import pytest

from granq_jax.runtime import progress
from granq_jax.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_are_lines_now_and_then(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(1000) as shown:
        clock[0] = 500.0  # compiling, say
        for step in range(20, 1001, 20):
            shown.update(step, epoch="0/5", loss_g=f"{step}")
            clock[0] += 2.0
        shown.say("a line of its own")
    text = stream.getvalue()
    assert "\r" not in text
    first, *between, last, own = text.splitlines()
    assert first == "step 20/1000 (2 %), epoch 0/5, loss_g 20"  # no rate yet: what came before was compiling
    # Every 30 seconds: 15 updates of 2 seconds each.
    assert [line.split(" ")[1] for line in between] == ["320/1000", "620/1000", "920/1000"]
    assert between[0] == "step 320/1000 (32 %), 10 steps/s, 01:08 left, epoch 0/5, loss_g 320"
    assert last.startswith("step 1000/1000 (100 %), ")
    assert own == "a line of its own"


def test_what_was_left_unsaid_is_said_at_the_end(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with contextlib.suppress(KeyboardInterrupt), Progress(10, label="teacher", done=4) as shown:
        shown.update(5)
        clock[0] += 1
        shown.update(6)
        raise KeyboardInterrupt
    first, last = stream.getvalue().splitlines()
    assert first == "teacher: step 5/10 (50 %)"
    assert last == "teacher: step 6/10 (60 %), 1 steps/s, 00:04 left"


def test_on_a_terminal_there_is_one_line_that_moves(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(4, label="teacher") as shown:
        for step in range(1, 5):
            shown.update(step, loss=f"0.{step}")
        shown.say("a line of its own")
    text = stream.getvalue()
    assert "\r" in text
    assert "a line of its own\n" in text
    last = text.split("\r")[-1]
    assert "teacher: 100%" in last
    assert "4/4" in last
    assert "loss 0.4" in last
    assert "left" in last
