"""What ``result.json`` holds."""

from __future__ import annotations

import statistics
from typing import Any

import jax
from ml_collections import ConfigDict

from granq_jax.distill import guard
from granq_jax.distill.joint_run import JointRun
from granq_jax.distill.trainer import Variables
from granq_jax.quant import effective_weight_bits
from granq_jax.report import Inspection
from granq_jax.runs.accuracy import percentages
from granq_jax.runs.notes import RunNotes
from granq_jax.runs.record import describe, peak_rss_mb, versions


def result_of(
    config: ConfigDict,
    run: JointRun,
    notes: RunNotes,
    teacher: Variables,
    eval_examples: int,
    step: int,
    inspection: Inspection,
) -> dict[str, Any]:
    """What ``result.json`` holds of a run whose result is the student of ``step``, as ``inspection`` shows it."""
    return {
        **describe(config),
        "eval_examples": eval_examples,
        "effective_weight_bits": effective_weight_bits(teacher["params"], run.trainer.spec),
        "effective_act_bits": inspection.activation_storage.effective_bits,
        "storage_bytes": inspection.storage,
        "activation_bytes": inspection.activation_storage.bytes,
        "quantized_shares": inspection.shares._asdict(),
        "teacher": config.teacher,
        **percentages("teacher", notes.teacher_accuracy),
        **percentages("student", notes.accuracy_before, "_before"),
        **percentages("student", notes.evaluations.get(step)),
        "chosen_step": step,
        "broke_down_after": guard.breakdown(notes.scores),
        "guard": [{"step": at, **score._asdict()} for at, score in sorted(notes.scores.items())],
        "best_top1": None if notes.best_step is None else notes.evaluations[notes.best_step].top1,
        "best_step": notes.best_step,
        "best_picked_on": None if notes.best_step is None else "the test set",
        "steps": run.step,
        "skipped_steps": notes.skipped_steps,
        "seconds_per_step": statistics.median(notes.seconds_per_step),
        "compile_seconds": notes.compile_seconds,
        "peak_rss_mb": peak_rss_mb(),
        "devices": [str(device) for device in run.devices],
        "processes": jax.process_count(),
        "versions": versions(),
    }
