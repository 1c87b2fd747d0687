"""Several devices compute what one computes. In processes of their own, which have eight devices."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from granq_jax.runtime.devices import check_platforms, cores, mean_over_devices, sample_index
from tests.conftest import one_line_error

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device_agreement.py"


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


@pytest.mark.parametrize("devices", [1, 3])
def test_means_over_devices_of_small_and_large_arrays(devices):
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3), "large": (200, 200), "b": {"scalar": (), "none": None, "empty": (0, 2)}}
    tree = jax.tree.map(
        lambda shape: None if shape is None else rng.normal(size=(devices, *shape)).astype(np.float32),
        shapes,
        is_leaf=lambda shape: shape is None or isinstance(shape, tuple),
    )
    means = jax.vmap(lambda tree: mean_over_devices(tree, "batch"), axis_name="batch")(tree)
    chex.assert_trees_all_close(means, jax.tree.map(lambda x: np.broadcast_to(x.mean(0), x.shape), tree), rtol=1e-5)
    assert mean_over_devices(tree, None) is tree


HALVE = """
import os, sys
import jax
from granq_jax.runtime.devices import halve_cpu

sizes, before = sys.argv[1].split(","), sys.argv[2]
if before == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if before == "computed":
    jax.devices()
halve_cpu([int(size) for size in sizes])
print(jax.device_count())
"""


@pytest.mark.parametrize(
    ("sizes", "before", "environment", "devices"),
    [
        ("16,64", "", {}, min(2, cores())),
        ("16,63", "", {}, 1),
        ("16", "computed", {}, 1),
        ("16", "", {"JAX_NUM_CPU_DEVICES": "1"}, 1),
        ("16", "", {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
        pytest.param(
            *("16", "one core", {}, 1),
            marks=pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to keep to one core"),
        ),
    ],
)
def test_a_cpu_of_several_cores_is_two_devices_unless_something_speaks_against_it(sizes, before, environment, devices):
    own = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    command = [sys.executable, "-c", HALVE, sizes, before]
    finished = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True, timeout=60)
    assert int(finished.stdout) == devices


def devices_of(*processes):
    return [types.SimpleNamespace(process_index=process) for process in processes]


@pytest.mark.parametrize("error", [RuntimeError("No GPU\nwas found (set JAX_PLATFORMS='')"), AssertionError()])
def test_platforms_that_jax_cannot_use_are_refused(monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setattr(jax, "devices", fails)
    with one_line_error(ValueError, "JAX_PLATFORMS", "allowed", "'cpu'", str(error).split("\n")[0]):
        check_platforms()


def test_the_command_and_the_report_say_so_in_a_line(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "nonsense"}
    (tmp_path / "config.json").write_text("{}")
    for arguments in (
        ["granq_jax.main", "--config=digits_w2a2", "--workdir=run", "--config.eval=none", "--config.teacher=train"],
        ["granq_jax.report", "."],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: JAX_PLATFORMS: got 'nonsense'")
        assert ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_process_has_the_samples_of_its_own_devices(monkeypatch):
    shares = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(sample_index(8, devices_of(0, 1, 1, 0)).tolist())
    assert shares == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]
