"""Where arrays live when a step is mapped over several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def sample_index(batch_size: int, devices: Sequence[jax.Device], field: str = "batch_size") -> np.ndarray:
    """The global indices of the samples that fall to this process's share of ``devices``.

    Returns:
      (its devices, batch_size / devices), int32; of the only process, all of the batch.

    Raises:
      ValueError: if the batch does not divide evenly; it names ``field`` and sizes that do.

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
        raise ValueError(f"{field}: got {batch_size} on {where}, allowed are multiples of {count}, such as {near}")
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
