"""A whole run: teacher, joint steps, evaluation, and the files it leaves."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from granq_jax.build import check_devices, make_trainer
from granq_jax.checkpoint import Checkpoints
from granq_jax.config import check_config
from granq_jax.data import DATASETS, load_split
from granq_jax.evaluate import Accuracy, float_accuracy, percentages, student_accuracy
from granq_jax.joint_run import JointRun
from granq_jax.metrics import EVENTS, MetricsLog
from granq_jax.quant import effective_weight_bits
from granq_jax.record import STARTS, describe, peak_rss_mb, record_start, versions, write_json, write_text
from granq_jax.reporting import REPORT, Inspection, RunRecord, image_grid, inspector, run_page, run_record
from granq_jax.splits import Split
from granq_jax.teachers import TRAINED_TEACHER, check_teacher, load_teacher
from granq_jax.trainer import Variables

_LOGGER = logging.getLogger(__name__)
_RUN_FILES = ("config.json", STARTS, "metrics.jsonl", EVENTS, "checkpoints", REPORT, "result.json")


def train_and_evaluate(config: ConfigDict, workdir: str | Path, *, command: str = "") -> dict[str, Any]:
    """Quantizes a teacher without data and says how good the student is.

    In ``workdir`` it leaves ``config.json``, ``starts.jsonl``, ``metrics.jsonl``, ``tensorboard/``,
    ``checkpoints/``, ``report.html``, ``result.json`` (last), and where asked for ``profile/`` and the
    teacher it trained. Everything is checked before work starts.

    Args:
      config: see :func:`granq_jax.config.default_config`.
      workdir: a directory without a run in it; made if it is missing.
      command: for the record, as it was typed; ``""`` says that it was none.

    Returns:
      What ``result.json`` holds. Accuracies are in percent; those of a run with ``eval="none"`` are
      ``None``.

    Raises:
      ValueError, TypeError, FileNotFoundError, ImportError: for a setting, teacher, data set or
        workdir that cannot be used, before anything is written.
      RuntimeError: if the run itself fails.

    Example::

      config = load_config("digits_w3a3")
      result = train_and_evaluate(config, "runs/digits_w3a3")
      print(result["teacher_top1"], result["student_top1"])
    """
    check_config(config)
    workdir = Path(workdir)
    _check_workdir(workdir)
    devices = jax.local_devices()
    check_devices(config, devices)
    check_teacher(config)
    split = load_split(config.dataset, "test", config.data_dir) if config.eval == "test" else None
    teacher = load_teacher(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())
    record_start(workdir, command)
    try:
        result, inspection = _run(config, workdir, teacher, split, devices)
    except (ValueError, TypeError) as error:
        # Past the checks it is no longer the input that is wrong: let the trace be seen.
        raise RuntimeError(f"the run in {str(workdir)!r} failed: {error}") from error
    _write_report(run_record(workdir, config, result, result["steps"], inspection))
    write_json(workdir / "result.json", result)
    return result


def _write_report(run: RunRecord) -> None:
    try:
        write_text(run.workdir / REPORT, run_page(run))
    except Exception as error:  # the result of a long run is not lost over its report
        _LOGGER.warning("there is no report: %s; try `python -m granq_jax.report %s`", error, run.workdir)


def _check_workdir(workdir: Path) -> None:
    if any((workdir / name).exists() for name in (*_RUN_FILES, TRAINED_TEACHER)):
        raise ValueError(f"workdir: {str(workdir)!r} already holds a run; give another one, or move it away")
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir: {str(workdir)!r} is a file, allowed is a directory, new or without a run in it")
    existing = next(parent for parent in (workdir, *workdir.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise ValueError(f"workdir: {str(workdir)!r} cannot be written to, allowed is a directory that can")


def _run(
    config: ConfigDict, workdir: Path, teacher: Variables, split: Split | None, devices: Sequence[jax.Device]
) -> tuple[dict[str, Any], Inspection]:
    """Trains and evaluates, with metrics and checkpoints; returns the result and the last inspection."""
    trainer = make_trainer(config)
    inspect = inspector(trainer, teacher)
    total = config.epochs * config.steps_per_epoch
    teacher_accuracy = accuracy_before = None
    evaluations: dict[int, Accuracy] = {}
    with MetricsLog(workdir, total, config.epochs) as log, Checkpoints(workdir) as checkpoints:
        if split is not None:
            evaluate = student_accuracy(trainer, split, config.eval_batch_size, devices)
            teacher_accuracy = float_accuracy(trainer.model, split, config.eval_batch_size, devices)(teacher)
            accuracy_before = evaluate(teacher)
            log.accuracy(0, teacher_top1=teacher_accuracy.top1, student_top1=accuracy_before.top1)
            log.say(
                f"teacher {teacher_accuracy.top1:.2f} %, student before training {accuracy_before.top1:.2f} % top-1"
            )
        run = JointRun(trainer, teacher, devices)
        windows = []
        for step, metrics, seconds in _logged_steps(run, config, workdir / "profile"):
            epoch, into_epoch = divmod(step, config.steps_per_epoch)
            log.train(step, epoch, metrics, seconds)
            windows.append(seconds)
            if into_epoch:
                continue
            if epoch % config.eval_every_epochs == 0 or step == total:
                if split is not None:
                    evaluations[step] = evaluate(run.state.student)
                    log.evaluation(step, epoch, evaluations[step].top1)
                inspection = inspect(run.state)
                _log_inspection(log, step, inspection, config)
            if epoch % config.checkpoint_every_epochs == 0 or step == total:
                checkpoints.save(step, run.state)

    best_step = max(evaluations, key=lambda step: evaluations[step].top1, default=None)
    result = {
        **describe(config),
        "eval_examples": 0 if split is None else len(split),
        "effective_weight_bits": effective_weight_bits(teacher["params"], trainer.spec),
        "storage_bytes": inspection.storage,
        "teacher": config.teacher,
        **percentages("teacher", teacher_accuracy),
        **percentages("student", accuracy_before, "_before"),
        **percentages("student", evaluations.get(total)),
        "best_top1": None if best_step is None else evaluations[best_step].top1,
        "best_step": best_step,
        "best_picked_on": None if best_step is None else "the test set",
        "steps": total,
        "seconds_per_step": statistics.median(windows),
        "compile_seconds": run.compile_seconds,
        "peak_rss_mb": peak_rss_mb(),
        "devices": [str(device) for device in devices],
        "versions": versions(),
    }
    return result, inspection


def _log_inspection(log: MetricsLog, step: int, inspection: Inspection, config: ConfigDict) -> None:
    log.images(step, image_grid(DATASETS[config.dataset].pixels(inspection.images)))
    for observation in inspection.observations:
        if observation.code_counts is not None:
            log.codes(step, f"{observation.site.kind}/{observation.site.path}", np.asarray(observation.code_counts))


def _logged_steps(
    run: JointRun, config: ConfigDict, profile_dir: Path
) -> Iterator[tuple[int, dict[str, float], float]]:
    """Takes all steps; yields (steps taken, metrics, seconds a step) where a line is to be logged.

    The clock stands still while the consumer works, and while a phase compiles.
    """
    first_traced = config.profile.start + 1 if config.profile.steps else 0
    window_start, window_compile, window_first = time.perf_counter(), run.compile_seconds, 0
    for step in range(1, config.epochs * config.steps_per_epoch + 1):
        if step == first_traced:
            jax.profiler.start_trace(profile_dir, create_perfetto_trace=True)
        with jax.profiler.StepTraceAnnotation("joint_step", step_num=step):
            metrics = run.advance(warmup=step <= config.warmup_epochs * config.steps_per_epoch)
        if first_traced and step == first_traced + config.profile.steps - 1:
            jax.block_until_ready(run.state)
            jax.profiler.stop_trace()
        if step % config.log_every_steps == 0 or step % config.steps_per_epoch == 0:
            # By way of its text a float32 becomes the shortest number that means it: 0.001.
            values = {name: float(str(value)) for name, value in jax.device_get(metrics).items()}
            elapsed = time.perf_counter() - window_start - (run.compile_seconds - window_compile)
            yield step, values, elapsed / (step - window_first)
            window_start, window_compile, window_first = time.perf_counter(), run.compile_seconds, step
