"""The log of a run: what a run that goes on finds, cuts and writes."""

import json

import pytest

from granq_jax.metrics import LOSSES, RATES, MetricsLog
from tests.test_checkpoint import largest_file

VALUES = dict.fromkeys(LOSSES + RATES, 0.5)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_past_the_checkpoint_are_cut_and_the_clock_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 10) as log:
        log.train(1, 0, VALUES)
        size = log.saved_size()
        log.train(2, 0, VALUES)
    with path.open("a") as file:
        file.write('{"step": 3, "ep')  # killed within a line
    with MetricsLog(path, 10, step=1, seconds=50.0, size=size) as log:
        log.train(2, 0, VALUES)
        log.evaluation(2, 1, 99.0)
    lines = lines_of(path)
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0]["seconds"] < 50 <= lines[1]["seconds"] < 60


def test_lines_that_were_lost_are_reported(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 10) as log:
        log.evaluation(1, 0, 90.0)
        log.evaluation(2, 0, 90.0)
        size = log.saved_size()
    path.write_bytes(path.read_bytes()[:-5])
    with MetricsLog(path, 10, step=2, size=size) as log:
        log.evaluation(3, 0, 90.0)
    assert [line["step"] for line in lines_of(path)] == [1, 3]
    assert "lost lines" in caplog.text


def test_a_full_disk_is_heard_of_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 10) as log:
        log.evaluation(1, 0, 90.0)
        with largest_file(log.saved_size() + 5), pytest.raises(OSError, match="File too large"):
            log.evaluation(2, 0, 90.0)
    assert path.read_bytes().count(b"\n") == 1


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 10) as log:
        log.train(1, 0, VALUES | {"bns": float("nan"), "loss_g": float("inf")})
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert (line["bns"], line["loss_g"], line["hinge"]) == (None, None, 0.5)
