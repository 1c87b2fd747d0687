"""The logs of a run: lines and events, and what a run that goes on finds, cuts and writes."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from granq_jax.runs import names
from granq_jax.runs.metrics import LOSSES, RATES, MetricsLog
from tests.runs.test_checkpoint import largest_file

VALUES = dict.fromkeys(LOSSES + RATES, 0.5)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_past_the_checkpoint_are_cut_and_the_clock_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 10, 5) as log:
        log.train(1, 0, VALUES, 0.5)
        size = log.saved_size()
        log.train(2, 0, VALUES, 0.5)
    with path.open("a") as file:
        file.write('{"step": 3, "ep')  # killed within a line
    with MetricsLog(tmp_path, 10, 5, step=1, seconds=50.0, size=size) as log:
        log.train(2, 0, VALUES, 0.5)
        log.evaluation(2, 1, 99.0)
    lines = lines_of(path)
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0]["seconds"] < 50 <= lines[1]["seconds"] < 60


def test_lines_that_were_lost_are_reported(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 10, 5) as log:
        log.evaluation(1, 0, 90.0)
        log.evaluation(2, 0, 90.0)
        size = log.saved_size()
    path.write_bytes(path.read_bytes()[:-5])
    with MetricsLog(tmp_path, 10, 5, step=2, size=size) as log:
        log.evaluation(3, 0, 90.0)
    assert [line["step"] for line in lines_of(path)] == [1, 3]
    assert "lost lines" in caplog.text


def test_a_full_disk_is_heard_of_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 10, 5) as log:
        log.evaluation(1, 0, 90.0)
        with largest_file(log.saved_size() + 5), pytest.raises(OSError, match="File too large"):
            log.evaluation(2, 0, 90.0)
    assert path.read_bytes().count(b"\n") == 1


def test_a_full_disk_is_heard_of_by_way_of_the_events_too(tmp_path):
    def log_codes():
        with MetricsLog(tmp_path, 10, 5) as log, largest_file(20_000):
            for step in range(100):  # a queue that nobody empties would hold this up for ever
                log.codes(step, "weight/stem/conv", np.arange(256))

    with pytest.raises(OSError, match="File too large"):
        log_codes()


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path, 10, 5) as log:
        log.train(1, 0, VALUES | {"bns": float("nan"), "loss_g": float("inf")}, 0.5)
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert (line["bns"], line["loss_g"], line["hinge"]) == (None, None, 0.5)


def crc32c(data):
    """The Castagnoli checksum, masked as the TFRecord format wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(workdir):
    """Events of all files of a run, in the order in which they were begun; every checksum is checked."""
    events = []
    for path in sorted((workdir / names.EVENTS).iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            header = data[at : at + 8]
            (length,), (header_crc,) = struct.unpack("<Q", header), struct.unpack("<I", data[at + 8 : at + 12])
            payload = data[at + 12 : at + 12 + length]
            (payload_crc,) = struct.unpack("<I", data[at + 12 + length : at + 16 + length])
            assert (header_crc, payload_crc) == (crc32c(header), crc32c(payload))
            events.append(Event.FromString(payload))
            at += 16 + length
    return events


def summaries(events):
    return [(event.step, value) for event in events for value in event.summary.value]


LINE = {name: float(i) for i, name in enumerate(LOSSES + RATES)}


def test_what_is_logged_can_be_read_back(tmp_path):
    counts = np.array([1, 0, 2, 5])
    with MetricsLog(tmp_path, total_steps=10, epochs=5) as log:
        log.accuracy(0, teacher_top1=90.0, student_top1=70.0)
        log.train(2, 1, LINE, seconds_per_step=0.5)
        log.images(2, np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
        log.codes(2, "weight/stem/conv", counts)
        log.evaluation(2, 1, 80.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [
        ["step", "epoch", *LOSSES, *RATES, "seconds"],
        ["step", "epoch", "student_top1"],
    ]
    logged = summaries(read_events(tmp_path))
    scalars = {(step, value.tag): value.simple_value for step, value in logged if value.HasField("simple_value")}
    assert scalars == {
        (0, "accuracy/teacher_top1"): 90.0,
        (0, "accuracy/student_top1"): 70.0,
        (2, "accuracy/student_top1"): 80.0,
        (2, "speed/steps_per_second"): 2.0,
        **{(2, f"loss/{name}"): LINE[name] for name in LOSSES},
        **{(2, f"learning_rate/{name}"): LINE[name] for name in RATES},
    }
    (image,) = (value.image for _, value in logged if value.HasField("image"))
    assert (image.height, image.width, image.colorspace) == (4, 6, 3)
    (histogram,) = (value.histo for _, value in logged if value.HasField("histo"))
    assert list(histogram.bucket) == counts.tolist()
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (8, 0, 3, 19)


def test_a_later_start_takes_back_what_an_earlier_one_logged_too_far(tmp_path):
    with MetricsLog(tmp_path, 10, 5) as log:
        log.train(4, 2, LINE, 0.5)
    with MetricsLog(tmp_path, 10, 5, step=2) as log:
        log.train(4, 2, LINE, 0.5)
    assert len(list((tmp_path / names.EVENTS).iterdir())) == 2
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 3]  # from this step on


def test_lines_without_a_terminal(tmp_path, capsys):
    with MetricsLog(tmp_path, 4, 2) as log:
        log.train(2, 1, LINE, 0.5)
        log.evaluation(2, 1, 80.0)
        log.train(4, 2, LINE, 0.5)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\r" not in printed.err
    first, evaluation, last = printed.err.splitlines()
    assert first == "step 2/4 (50 %), epoch 1/2, loss_g 0, loss_s 1, hinge 2, onehot 3, bns 4"
    assert evaluation == "after epoch 1: student top-1 80.00 %"
    assert last.startswith("step 4/4 (100 %), ")
    assert "epoch 2/2, top-1 80.00 %, loss_g 0" in last


def test_neither_tensorflow_nor_a_plotting_library_is_imported():
    heavy = ("tensorflow", "tensorboard", "matplotlib")
    code = f"import sys, granq_jax.modes.train; print([name for name in {heavy} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert finished.stdout.strip() == "[]"
