"""``--mode export``: the student of a run as files that one ships."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from granq_jax.config import make_dataset, make_trainer
from granq_jax.data.splits import Dataset
from granq_jax.distill.trainer import Trainer, Variables, evaluation_mode
from granq_jax.export.packed import save_packed
from granq_jax.export.program import export_program
from granq_jax.files.writing import write_bytes, write_json
from granq_jax.modes.opening import opened
from granq_jax.quant import storage_bytes
from granq_jax.quant.dispatch import NoKernelError
from granq_jax.runs import names
from granq_jax.runs.record import check_writable, describe, versions
from granq_jax.runs.student import state_of_run

_LOGGER = logging.getLogger(__name__)
_LEVELS = 256
PACKED, PROGRAM, CUDA_PROGRAM = "student.safetensors", "student.jax", "student_cuda.jax"


def export_run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Writes the newest student of a run to ``workdir/export``.

    - ``student.safetensors``: see :func:`granq_jax.export.save_packed`;
    - ``student.jax``: a program for CPUs and CUDA, batch size free, from pixels (N, H, W, C), uint8 as
      the data set stores them, to logits, float32: see :func:`granq_jax.export.export_program`;
    - ``student_cuda.jax``: the same for CUDA alone, ``config.eval_batch_size`` images at a time, with
      the package's kernels in it where they cover what is quantized; left out, which is logged, by a JAX that
      cannot lower them;
    - ``export.json``: what is returned.

    Args:
      config: that of the run, ``load_config(workdir / "config.json")``.
      workdir: of the run.

    Returns:
      The step, the bytes of each file, and ``theoretical_bytes``: what the packed variables take with
      nothing around them.

    Raises:
      InputError: if there is no student, or it cannot be written.
    """
    workdir, _, _ = opened("export", config, workdir, check_writable)
    trainer = make_trainer(config)
    step, state = state_of_run(trainer, workdir)
    student = state.result
    folder = workdir / names.EXPORT
    folder.mkdir(exist_ok=True)
    dataset, spec = make_dataset(config), trainer.spec
    theoretical = {key: size for key, size in storage_bytes(student, spec).items() if key != "teacher"}
    sizes = {PACKED: save_packed(folder / PACKED, student, spec, config.network)}
    programs: dict[str, dict[str, Any]] = {
        PROGRAM: {},
        CUDA_PROGRAM: {"batch_size": config.eval_batch_size, "platforms": ("cuda",), "impl": "pallas"},
    }
    for name, how in programs.items():
        try:
            program = export_pixels_program(trainer, dataset, student, **how)
        except NoKernelError as error:
            _LOGGER.warning("%s is left out: %s", name, error)
            (folder / name).unlink(missing_ok=True)  # of an earlier student
            continue
        sizes[name] = write_bytes(folder / name, program.serialize())
    exported = {
        **describe(config),
        "step": step,
        "bytes": sizes,
        "theoretical_bytes": sum(theoretical.values()),
        "image": {"shape": dataset.image_shape, "dtype": "uint8", "max_value": dataset.max_value},
        "cuda_batch_size": config.eval_batch_size,
        "versions": versions(),
    }
    write_json(folder / "export.json", exported)
    return exported


def export_pixels_program(trainer: Trainer, dataset: Dataset, variables: Variables, **how: Any) -> jax.export.Exported:
    """:func:`granq_jax.export.export_program` of a student, from pixels as ``dataset`` has them, uint8."""
    return export_program(
        trainer.model,
        trainer.spec,
        variables,
        dataset.image_shape,
        dtype=np.uint8,
        prepare=partial(_normalise, dataset),
        **evaluation_mode(trainer.model),
        **how,
    )


def _normalise(dataset: Dataset, pixels: jax.Array) -> jax.Array:
    """``dataset.normalise`` of uint8 pixels by a table: XLA would round it otherwise, and a code may hang on that."""
    levels = np.arange(_LEVELS, dtype=np.uint8).reshape(1, 1, -1, 1).repeat(dataset.channels, -1)
    table = jnp.asarray(dataset.normalise(levels)[0, 0])
    return table[pixels.astype(jnp.int32), jnp.arange(dataset.channels)[None, None, None]]
