"""Checkpoints of a run (Orbax), and variables in one file (safetensors)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import orbax.checkpoint as ocp
import safetensors.flax

KEPT = 2
_REASON_LENGTH = 300  # TensorStore's messages fill pages


class Checkpoints:
    """The checkpoints of one run, the newest ``KEPT`` of them, in ``workdir/checkpoints``."""

    def __init__(self, workdir: Path):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True),
        )

    def save(self, step: int, state: Any) -> None:
        """Saves ``state``, a pytree, as of ``step``; it goes on in the background."""
        self._manager.save(step, args=ocp.args.StandardSave(flax.serialization.to_state_dict(state)))

    def latest_step(self) -> int | None:
        """The newest step saved, ``None`` if there is none."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at ``step``, with the structure, shapes and dtypes of ``like``.

        Raises:
          ValueError: if it is damaged, or of another structure.
        """
        on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one_device),
            flax.serialization.to_state_dict(like),
        )
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and TensorStore raise many kinds, Exception itself among them
            reason = " ".join(str(error).split())[:_REASON_LENGTH]
            raise ValueError(
                f"workdir: checkpoint {step} in {self._manager.directory} cannot be read: {reason}"
            ) from error
        return flax.serialization.from_state_dict(like, restored)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save_variables(path: Path, variables: Any) -> None:
    """Writes Flax variables to a ``.safetensors`` file, under ``/``-joined names, whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    safetensors.flax.save_file(flax.traverse_util.flatten_dict(variables, sep="/"), unfinished)
    os.replace(unfinished, path)
