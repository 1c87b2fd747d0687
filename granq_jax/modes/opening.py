"""What every mode begins with: settings, devices, directory and data are looked at before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from granq_jax.config import check_config, flat
from granq_jax.data.datasets import load_split
from granq_jax.data.splits import Split
from granq_jax.errors import InputError, reading_input
from granq_jax.runtime.devices import sample_index
from granq_jax.runtime.paths import expanded
from granq_jax.runtime.processes import check_alike, is_first, together


class Opening(NamedTuple):
    """What a mode works with.

    Attributes:
      workdir: its directory; ``~`` is read.
      devices: of all processes.
      split: the test images; ``None`` where nothing is evaluated.
    """

    workdir: Path
    devices: list[jax.Device]
    split: Split | None


def opened(
    mode: str,
    config: ConfigDict,
    workdir: str | Path,
    check: Callable[[Path], None],
    evaluates: bool = False,
    **arguments: Any,
) -> Opening:
    """Looks at all that was given; writes nothing.

    Args:
      mode: as ``--mode`` names it.
      config: of the run.
      workdir: of the run.
      check: called in the first process with the directory; raises if that cannot be used.
      evaluates: whether the test images are wanted, where ``config.eval`` says so.
      **arguments: the mode's own, which have to be alike in all processes.

    Raises:
      InputError: in every process, if anything cannot be used in one of them.
    """
    check_alike({"--mode": mode, **arguments, **dict(flat(config, "config."))})
    devices, split = jax.devices(), None
    with together(), reading_input():
        workdir = expanded(workdir, "workdir")
        check_config(config)
        _check_devices(config, devices)
        if is_first():
            check(workdir)
        if evaluates and config.eval == "test":
            split = load_split(config.dataset, "test", config.data_dir, config.mean, config.std)
    return Opening(workdir, devices, split)


def _check_devices(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
    """Raises an ``InputError`` if the batches or the kernels of a config do not fit ``devices``."""
    sample_index(config.batch_size, devices, "config.batch_size")
    if config.eval != "none":
        sample_index(config.eval_batch_size, devices, "config.eval_batch_size")
    if config.quant.impl == "pallas" and devices[0].platform != "gpu":
        raise InputError(
            f"config.quant.impl: got 'pallas' on {devices[0].platform}, where only 'auto', 'xla' and "
            "'pallas_interpret' are allowed"
        )
