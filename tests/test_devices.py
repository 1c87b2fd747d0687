"""Several devices compute what one computes. In processes of their own, which have eight devices."""

import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from granq_jax.devices import sample_index
from tests.conftest import one_line_error

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device_agreement.py"


def agreement(*arguments):
    command = [sys.executable, str(SCRIPT), "--json", "--dtypes", "float64", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    return json.loads(finished.stdout)["float64"]


@pytest.mark.slow
def test_losses_agree_in_float64():
    table = agreement("--network", "resnet8_digits", "--granularity", "tensor")
    assert set(table) == {"2", "4", "8", "2 x 2"}
    for terms in table.values():
        assert max(terms) < 1e-9


def test_a_batch_that_does_not_divide_is_refused():
    with one_line_error(ValueError, "config.batch_size", "20", "3 devices", "18 or 21"):
        sample_index(20, jax.devices() * 3, "config.batch_size")
    with one_line_error(ValueError, "config.batch_size", "6", "4 devices of 2 processes", "4 or 8"):
        sample_index(6, devices_of(0, 0, 1, 1), "config.batch_size")


def devices_of(*processes):
    return [types.SimpleNamespace(process_index=process) for process in processes]


def test_a_process_has_the_samples_of_its_own_devices(monkeypatch):
    shares = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(sample_index(8, devices_of(0, 1, 1, 0)).tolist())
    assert shares == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]
