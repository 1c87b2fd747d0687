"""Which devices there are, and where arrays live when a step is mapped over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from granq_jax.errors import InputError

AXIS = "batch"
# Arrays with fewer elements are better joined first: XLA for CPUs takes 50 us for each that devices exchange, and
# milliseconds to compile what is done to it, and far less to copy one of this size.
SMALL = 2**15
_FORCED = "--xla_force_host_platform_device_count"
# XLA ends a process in which one device has waited for another for 40 seconds by the clock. One that was halted, or
# whose machine slept, is to go on.
_WAIT = "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"


def cores() -> int:
    """How many CPU cores this process may use.

    Examples:
      >>> cores() >= 1
      True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_platforms() -> None:
    """Has JAX look for its devices; for the whole process, after whatever says how many there are.

    Raises:
      InputError: if it cannot use the platforms that it was told to.
    """
    try:
        jax.devices()
    except Exception as error:  # of several kinds, one of them without words
        reason = str(error).split("\n")[0].partition(" (set JAX_PLATFORMS")[0] or "there is no such device"
        raise InputError(
            f"JAX_PLATFORMS: got {jax.config.jax_platforms or ''!r}, which JAX cannot use: {reason}; allowed are "  # type: ignore[attr-defined]
            "platforms whose devices and plug-in are there (for NVIDIA's GPUs: pip install 'jax[cuda12]'), and 'cpu'"
        ) from error


def halve_cpu(batch_sizes: Sequence[int]) -> None:
    """Has JAX take a CPU of several cores for two devices, each with half of a batch.

    XLA computes most operations of a step on one core, and the other one waits; see ``docs/performance.md``. For the
    whole process, before it computes. Nothing changes with a single core, with a batch that has no halves, where
    the number of devices has been chosen (``JAX_NUM_CPU_DEVICES``, ``XLA_FLAGS``), or where JAX has computed already.

    Args:
      batch_sizes: of all batches that are to be spread over devices.

    Example::

      halve_cpu([config.batch_size])
      print(jax.devices())
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = jax.config.jax_num_cpu_devices >= 0 or _FORCED in flags  # type: ignore[attr-defined]
    if chosen or cores() < 2 or any(size % 2 for size in batch_sizes):
        return
    try:
        jax.config.update("jax_num_cpu_devices", 2)
    except RuntimeError:  # too late
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_WAIT}".strip()


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Means over the devices of a mapped axis, of all arrays in one exchange and the small ones as one array.

    Args:
      tree: float arrays.
      axis_name: mapped axis; ``None`` changes nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> over_two = jax.vmap(lambda tree: mean_over_devices(tree, "batch"), axis_name="batch")
      >>> over_two({"a": jnp.array([1.0, 3.0])})["a"].tolist()
      [2.0, 2.0]
    """
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return tree
    small = jax.tree.map(lambda x: x if x.size < SMALL else None, tree)
    large = jax.tree.map(lambda x: None if x.size < SMALL else x, tree)
    flat, unravel = ravel_pytree(small)
    flat, large = jax.lax.pmean((flat, large), axis_name)
    return jax.tree.map(lambda a, b: b if a is None else a, unravel(flat), large, is_leaf=lambda x: x is None)


def sample_index(batch_size: int, devices: Sequence[jax.Device], field: str = "batch_size") -> np.ndarray:
    """The global indices of the samples that fall to this process's share of ``devices``.

    Returns:
      (its devices, batch_size / devices), int32; of the only process, all of the batch.

    Raises:
      InputError: if the batch does not divide evenly; it names ``field`` and sizes that do.

    Examples:
      >>> import jax
      >>> sample_index(4, jax.devices()[:1]).tolist()
      [[0, 1, 2, 3]]
    """
    count = len(devices)
    if batch_size % count:
        below = batch_size // count * count
        near = " or ".join(str(size) for size in (below, below + count) if size)
        processes = len({device.process_index for device in devices})
        where = f"{count} devices" + (f" of {processes} processes" if processes > 1 else "")
        raise InputError(f"{field}: got {batch_size} on {where}, allowed are multiples of {count}, such as {near}")
    own = [device.process_index == jax.process_index() for device in devices]
    return np.arange(batch_size, dtype=np.int32).reshape(count, -1)[own]


def place(tree: Any, devices: Sequence[jax.Device], split: bool = False) -> Any:
    """Puts ``tree`` where a mapped function wants it: whole on each device, or split by axis 0.

    Of several processes, each gives the whole of what is to be whole, the same in all, and its own
    devices' part of what is to be split. What is there already stays as it is.
    """
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS) if split else PartitionSpec())

    def put(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, tree)


def settle(tree: Any, devices: Sequence[jax.Device]) -> None:
    """Waits for ``tree`` where a second step in flight could stop the first one for good.

    Several CPU devices share one pool of threads, and a collective keeps its thread until all
    devices have come to it; XLA ends a process that has waited for 40 seconds.
    """
    if len(devices) > 1 and devices[0].platform == "cpu":
        jax.block_until_ready(tree)
