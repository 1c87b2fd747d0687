"""Top-1 accuracy on real images, of a model and of a run's student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from granq_jax.build import check_devices, make_trainer
from granq_jax.checkpoint import Checkpoints
from granq_jax.config import check_config
from granq_jax.data import Split, batches, load_split
from granq_jax.devices import AXIS, place, sample_index
from granq_jax.quant import effective_weight_bits, quantize
from granq_jax.record import describe, versions, write_json
from granq_jax.step import evaluation_mode
from granq_jax.trainer import Trainer

Top1 = Callable[[Any], float]


def float_top1(model: nn.Module, split: Split, batch_size: int, devices: Sequence[jax.Device]) -> Top1:
    """A function from a float model's variables to its top-1 accuracy on ``split``, in percent."""
    return _make_top1(lambda v, x: model.apply(v, x, **evaluation_mode(model)), split, batch_size, devices)


def student_top1(trainer: Trainer, split: Split, batch_size: int, devices: Sequence[jax.Device]) -> Top1:
    """The same for the quantized student.

    ``batch_size`` has no influence on the figure but by way of rounding, except for activation
    granularities whose ranges are shared between samples (``"tensor"`` and ``"channel"``).
    """
    student = quantize(trainer.model, trainer.spec, impl=trainer.impl, axis_name=AXIS)
    return _make_top1(lambda v, x: student.apply(v, x, **evaluation_mode(trainer.model)), split, batch_size, devices)


def evaluate_run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run and writes ``workdir/evaluation.json``.

    Args:
      config: the run's own (``load_config(workdir / "config.json")``), perhaps with another
        ``data_dir``.
      workdir: of the run.

    Returns:
      What ``evaluation.json`` holds.

    Raises:
      ValueError: for a setting that is not allowed, or if there is no checkpoint or no data.
    """
    check_config(config)
    workdir = Path(workdir)
    if config.eval != "test":
        raise ValueError(f"config.eval: got {config.eval!r}, allowed is 'test' where a run is evaluated")
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
    devices = jax.local_devices()
    check_devices(config, devices)
    split = load_split(config.dataset, "test", config.data_dir)
    trainer = make_trainer(config)
    images = jnp.asarray(split.dataset.normalise(split.images[:1]))
    like = jax.eval_shape(lambda: trainer.init(trainer.model.init(jax.random.key(0), images)))
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise ValueError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
        student = checkpoints.restore(step, like).student
    evaluation = {
        **describe(config),
        "eval_examples": len(split),
        "effective_weight_bits": effective_weight_bits(student["params"], trainer.spec),
        "step": step,
        "student_top1": student_top1(trainer, split, config.eval_batch_size, devices)(student),
        "versions": versions(),
    }
    write_json(workdir / "evaluation.json", evaluation)
    return evaluation


def _make_top1(apply: Callable, split: Split, batch_size: int, devices: Sequence[jax.Device]) -> Top1:
    shape = sample_index(batch_size, devices, "eval_batch_size").shape

    def correct(variables, images, labels, weights):
        hits = jnp.argmax(apply(variables, images), axis=-1) == labels
        return jax.lax.psum(jnp.sum(hits * weights), AXIS)

    mapped = jax.pmap(correct, axis_name=AXIS, in_axes=(None, 0, 0, 0), out_axes=None, devices=devices)

    def top1(variables):
        variables = place(variables, devices)
        counts = [
            mapped(variables, *place([a.reshape(*shape, *a.shape[1:]) for a in batch], devices, split=True))
            for batch in batches(split, batch_size)
        ]
        return 100.0 * sum(float(count) for count in counts) / len(split)

    return top1
