"""Accuracy on real images, of a teacher and of a student."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from granq_jax import guard
from granq_jax.build import check_devices, make_trainer
from granq_jax.checkpoint import Checkpoints
from granq_jax.checks import check_choice
from granq_jax.config import TRAIN_A_TEACHER, check_config, flat
from granq_jax.data import load_split
from granq_jax.devices import AXIS, cores, place, sample_index
from granq_jax.models.registry import variants
from granq_jax.paths import expanded
from granq_jax.platforms import multiplied_in, traced_for
from granq_jax.processes import check_alike, from_first, is_first, together
from granq_jax.quant import effective_weight_bits, quantize
from granq_jax.record import check_writable, describe, versions, write_json
from granq_jax.splits import Split, batches
from granq_jax.teachers import TRAINED_TEACHER, load_teacher
from granq_jax.trainer import Trainer, TrainState, Variables, evaluation_mode


class Accuracy(NamedTuple):
    """Shares of the images, in percent, whose label is the likeliest class, or among the five likeliest."""

    top1: float
    top5: float


# Batches computed side by side: what each needs beside the parameters is in memory that often.
_MAX_AT_ONCE = 4

SUBJECTS = ("teacher", "student", "both")

Evaluation = Callable[[Variables], Accuracy]


def float_accuracy(
    model: nn.Module, split: Split, batch_size: int, devices: Sequence[jax.Device], precision: str = "default"
) -> Evaluation:
    """A function from a float model's variables to its accuracy on ``split``.

    ``precision`` is that of its products, see :func:`granq_jax.platforms.multiplied_in`.
    """
    mode = evaluation_mode(model)
    return _make_evaluation(lambda v, x: model.apply(v, x, **mode), split, batch_size, devices, precision)


def student_accuracy(trainer: Trainer, split: Split, batch_size: int, devices: Sequence[jax.Device]) -> Evaluation:
    """The same for the quantized student, in the trainer's precision.

    ``batch_size`` has no influence on the figure but by way of rounding, except for activation
    granularities whose ranges are shared between samples (``"tensor"`` and ``"channel"``).
    """
    student = quantize(trainer.model, trainer.spec, impl=trainer.impl, axis_name=AXIS)
    mode = evaluation_mode(trainer.model)
    return _make_evaluation(lambda v, x: student.apply(v, x, **mode), split, batch_size, devices, trainer.precision)


def evaluate_run(config: ConfigDict, workdir: str | Path, subject: str = "") -> dict[str, Any]:
    """Evaluates a config's teacher, the student of a run, or both: ``--mode evaluate``.

    Writes ``workdir/evaluation.json``.

    Args:
      config: of a run its own (``load_config(workdir / "config.json")``), perhaps with another
        ``data_dir``.
      workdir: of the run; for a teacher alone, any directory.
      subject: one of ``SUBJECTS``; ``""`` is the student where ``workdir`` holds one, and otherwise
        the teacher.

    Returns:
      What ``evaluation.json`` holds.

    Raises:
      ValueError, OSError, ImportError: for a setting, teacher or data set that cannot be used, or if
        a student is asked for and there is none.
      RunError: if an image cannot be read.
    """
    check_alike({"--mode": "evaluate", "--subject": subject, **dict(flat(config, "config."))})
    workdir = expanded(workdir, "workdir")
    devices = jax.devices()
    holds_run = from_first(lambda: os.path.isdir(workdir / "checkpoints"))
    subject = subject or ("student" if holds_run else "teacher")
    with together():
        check_config(config)
        check_choice("subject", subject, SUBJECTS)
        if config.eval != "test":
            raise ValueError(f"config.eval: got {config.eval!r}, allowed is 'test' in order to evaluate")
        if subject != "teacher" and not holds_run:
            raise ValueError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
        if is_first():
            check_writable(workdir)
            if subject != "student":
                check_teacher_of_run(config, workdir)
        check_devices(config, devices)
        split = load_split(config.dataset, "test", config.data_dir, config.mean, config.std)
    trainer = make_trainer(config)
    evaluation = {**describe(config), "eval_examples": len(split)}
    if subject != "student":
        teacher = load_teacher(config, workdir)
        evaluate = float_accuracy(trainer.model, split, config.eval_batch_size, devices, trainer.precision)
        evaluation |= {"teacher": config.teacher, **percentages("teacher", evaluate(teacher))}
    if subject != "teacher":
        step, state = state_of_run(trainer, workdir)
        student = state.result
        evaluate = student_accuracy(trainer, split, config.eval_batch_size, devices)
        evaluation |= {
            "effective_weight_bits": effective_weight_bits(student["params"], trainer.spec),
            "step": step,
            **percentages("student", evaluate(student)),
        }
    evaluation["versions"] = versions()
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "evaluation.json", evaluation)
    return evaluation


def state_of_run(trainer: Trainer, workdir: Path) -> tuple[int, TrainState]:
    """The step and the state of the student that a run gives, or would give now: see :mod:`granq_jax.guard`.

    Raises:
      ValueError: if ``workdir`` holds none.
    """
    size, channels = trainer.generator.image_size, trainer.generator.channels
    images = jnp.zeros((1, size, size, channels), trainer.dtype)
    shapes = (jax.eval_shape(build.init, jax.random.key(0), images) for build in variants(trainer.model))
    if not os.path.isdir(workdir / "checkpoints"):
        raise ValueError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
    likes = [trainer.state_shapes(variables) for variables in shapes]
    with Checkpoints(workdir, read_only=True) as checkpoints:
        saved = checkpoints.newest(*likes)
        if saved is None:
            raise ValueError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
        chosen = guard.chosen(guard.scores_of(saved.notes))
        if chosen is not None and chosen != saved.step:
            saved = checkpoints.of_step(chosen, *likes)
    return saved.step, saved.state


def teacher_of_run(config: ConfigDict, workdir: Path) -> Variables:
    """The teacher of a run that has been; it is not trained for this.

    Raises:
      ValueError, OSError, ImportError: if it cannot be had.
    """
    check_teacher_of_run(config, workdir)
    return load_teacher(config, workdir)


def check_teacher_of_run(config: ConfigDict, workdir: Path) -> None:
    """Raises a ``ValueError`` if the teacher is one that ``workdir`` should hold and does not."""
    if config.teacher == TRAIN_A_TEACHER and not (workdir / TRAINED_TEACHER).is_file():
        raise ValueError(f"config.teacher: got {config.teacher!r}, but {str(workdir)!r} holds no trained teacher")


def percentages(subject: str, accuracy: Accuracy | None, suffix: str = "") -> dict[str, float | None]:
    """The fields of a result that say how accurate ``subject`` is; ``None`` if it was not evaluated.

    Examples:
      >>> percentages("teacher", Accuracy(91.7, 99.6))
      {'teacher_top1': 91.7, 'teacher_top5': 99.6}
    """
    values = (None, None) if accuracy is None else accuracy
    return {f"{subject}_{name}{suffix}": value for name, value in zip(Accuracy._fields, values, strict=True)}


def _make_evaluation(
    apply: Callable, split: Split, batch_size: int, devices: Sequence[jax.Device], precision: str
) -> Evaluation:
    share = sample_index(batch_size, devices, "eval_batch_size")

    def correct(variables, images, labels, weights):
        with traced_for(devices), multiplied_in(precision):
            logits = apply(variables, images)
        _, likeliest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = likeliest == labels[:, None]
        counts = [jnp.sum(hits[:, :k].any(axis=1) * weights) for k in (1, 5)]
        return jax.lax.psum(jnp.stack(counts), AXIS)

    mapped = jax.pmap(correct, axis_name=AXIS, in_axes=(None, 0, 0, 0), out_axes=None, devices=devices)

    # XLA for CPUs computes most convolutions on one core, so that a batch for each core is faster than a batch on
    # all. The collectives of several devices must meet in the same order everywhere.
    at_once = min(cores(), _MAX_AT_ONCE) if devices[0].platform == "cpu" and len(devices) == 1 else 1

    def evaluate(variables):
        variables = place(variables, devices)

        def count(batch):
            parts = place([a.reshape(*share.shape, *a.shape[1:]) for a in batch], devices, split=True)
            return jax.device_get(mapped(variables, *parts))

        totals = np.zeros(2)  # a batch's counts are whole numbers that float32 holds exactly; their sum may not be
        with ThreadPoolExecutor(at_once, thread_name_prefix="evaluate") as threads:
            waiting: collections.deque[Future] = collections.deque()
            for batch in batches(split, batch_size, share.ravel()):
                # No more than these, so that batches do not pile up; the next one is decoded meanwhile.
                if len(waiting) == at_once:
                    totals += waiting.popleft().result()
                waiting.append(threads.submit(count, batch))
            totals += sum(future.result() for future in waiting)
        return Accuracy(*(100.0 * float(total) / len(split) for total in totals))

    return evaluate
