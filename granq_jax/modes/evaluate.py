"""``--mode evaluate``: how accurate a teacher and a run's student are on real images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from granq_jax.config import make_trainer
from granq_jax.errors import InputError, check_choice, reading_input
from granq_jax.files.writing import write_json
from granq_jax.modes.opening import opened
from granq_jax.quant import effective_weight_bits
from granq_jax.runs import names
from granq_jax.runs.accuracy import float_accuracy, percentages, student_accuracy
from granq_jax.runs.record import check_writable, describe, versions
from granq_jax.runs.student import state_of_run
from granq_jax.runtime.processes import from_first, is_first
from granq_jax.teachers.load import check_teacher_of_run, load_teacher

SUBJECTS = ("teacher", "student", "both")


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
      InputError: for a setting, teacher or data set that cannot be used, or if
        a student is asked for and there is none.
      RunError: if an image cannot be read.
    """

    def subject_of(workdir: Path) -> str:
        return subject or ("student" if os.path.isdir(workdir / names.CHECKPOINTS) else "teacher")

    def check(workdir: Path) -> None:
        if config.eval != "test":
            raise InputError(f"config.eval: got {config.eval!r}, allowed is 'test' in order to evaluate")
        check_choice("subject", subject_of(workdir), SUBJECTS)
        if subject_of(workdir) != "teacher" and not os.path.isdir(workdir / names.CHECKPOINTS):
            raise InputError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
        check_writable(workdir)
        if subject_of(workdir) != "student":
            check_teacher_of_run(config, workdir)

    workdir, devices, split = opened("evaluate", config, workdir, check, evaluates=True, **{"--subject": subject})
    assert split is not None  # config.eval is "test"
    subject = from_first(lambda: subject_of(workdir))
    trainer = make_trainer(config)
    evaluation = {**describe(config), "eval_examples": len(split)}
    if subject != "student":
        with reading_input():
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
        write_json(workdir / names.EVALUATION, evaluation)
    return evaluation
