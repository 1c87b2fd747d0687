"""A whole run: teacher, joint steps, evaluation, and the files it leaves."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from granq_jax.config import TRAIN_A_TEACHER, make_trainer
from granq_jax.distill.joint_run import JointRun
from granq_jax.errors import InputError, RunError, reading_input
from granq_jax.files.writing import write_json, write_text
from granq_jax.modes.loop import Loop
from granq_jax.modes.opening import opened
from granq_jax.modes.result import result_of
from granq_jax.report import RunRecord, run_page, run_record
from granq_jax.runs import names
from granq_jax.runs.checkpoint import Checkpoints, digest
from granq_jax.runs.notes import RunNotes
from granq_jax.runs.record import record_start
from granq_jax.runs.workdir import check_workdir, finished_result, locked, note_config, remove_run, teacher_is_of_run
from granq_jax.runtime.processes import from_first, interruptible_together, is_first, together
from granq_jax.runtime.stopping import interruptible
from granq_jax.teachers.load import check_loads, check_teacher, load_teacher

_LOGGER = logging.getLogger(__name__)


def train_and_evaluate(
    config: ConfigDict, workdir: str | Path, *, overwrite: bool = False, command: str = ""
) -> dict[str, Any]:
    """Quantizes a teacher without data and says how good the student is.

    In ``workdir`` it leaves ``config.json``, ``starts.jsonl``, ``metrics.jsonl``, ``tensorboard/``,
    ``checkpoints/``, ``held_out.safetensors`` (the guard's images), ``report.html``, ``result.json`` (last), and
    where asked for ``profile/`` and the teacher it trained. The student that it gives is the one that
    :mod:`granq_jax.distill.guard` chooses.
    Everything is checked before work starts.

    A run that ended early, in whatever way, goes on from its last checkpoint when it is called
    again, and ends as if it had never stopped. Of a run that is finished the result is returned.

    Args:
      config: see :func:`granq_jax.config.default_config`. To go on, it is that of the run, but for
        settings in :data:`granq_jax.runs.workdir.MAY_CHANGE`.
      workdir: a directory; made if it is missing.
      overwrite: whether to remove a run that is there, and start anew.
      command: for the record, as it was typed; ``""`` says that it was none.

    Returns:
      What ``result.json`` holds. Accuracies are in percent; those of a run with ``eval="none"`` are
      ``None``.

    Raises:
      InputError: for a setting, teacher, data set or ``workdir`` that cannot be
        used. Nothing that was there is touched.
      RunError: if a loss or parameter is not finite, or files cannot be written, or test images not read.
      Interrupted: at SIGTERM or SIGINT, when a checkpoint is written.

    Example::

      config = load_config("digits_w2a2")
      result = train_and_evaluate(config, "runs/digits_w2a2")
      print(result["teacher_top1"], result["student_top1"])
    """

    def check(workdir: Path) -> None:
        check_workdir(config, workdir, overwrite)
        check_teacher(config)

    arguments = {"--overwrite": overwrite}
    workdir, devices, split = opened("train", config, workdir, check, evaluates=True, **arguments)
    with together(), reading_input():
        if is_first() and config.teacher == TRAIN_A_TEACHER and (overwrite or not finished_result(config, workdir)):
            check_loads(config, workdir, anew=overwrite and teacher_is_of_run(workdir))

    def finished_before() -> dict[str, Any] | None:
        if overwrite:
            anew = config.teacher == TRAIN_A_TEACHER and teacher_is_of_run(workdir)
            check_loads(config, workdir, anew)
            remove_run(workdir, and_teacher=anew)
        check_workdir(config, workdir)  # again: another run may have been there
        return finished_result(config, workdir)

    with interruptible() as interruption, locked(workdir):
        finished = from_first(finished_before)
        if finished is not None:
            _LOGGER.warning("the run in %r is finished: this is its result", str(workdir))
            return finished
        with reading_input():
            teacher = load_teacher(config, workdir)
        trainer = make_trainer(config)
        with Checkpoints(workdir, config.keep_checkpoints) as checkpoints:
            saved = checkpoints.newest(trainer.state_shapes(teacher))
            notes = RunNotes(teacher=digest(teacher)) if saved is None else RunNotes.from_json(saved.notes)
            _check_goes_on(config, workdir, 0 if saved is None else saved.step, notes, digest(teacher))
            try:
                note_config(config, workdir)
                record_start(workdir, command)
                run = JointRun(trainer, teacher, devices, None if saved is None else saved.state)
                with interruptible_together(interruption) as interruption:
                    loop = Loop(config, workdir, run, notes, checkpoints, interruption)
                    step, inspection = loop.complete(teacher, split)
                result = result_of(config, run, notes, teacher, 0 if split is None else len(split), step, inspection)
                if is_first():
                    _write_report(run_record(workdir, config, result, result["steps"], inspection))
                write_json(workdir / names.RESULT, result)
            except OSError as error:
                raise RunError(f"workdir: {str(workdir)!r} could not be written to: {error}") from error
    return result


def _check_goes_on(config: ConfigDict, workdir: Path, step: int, notes: RunNotes, teacher: str) -> None:
    """Raises an ``InputError`` if the run cannot go on from ``step`` with the teacher of digest ``teacher``."""
    if notes.teacher != teacher:
        raise InputError(
            f"config.teacher: got {config.teacher!r}, but its weights are not those that the run in "
            f"{str(workdir)!r} was begun with; give that teacher, or replace the run with --overwrite"
        )
    if step > config.epochs * config.steps_per_epoch:
        raise InputError(
            f"config.epochs: got {config.epochs}, but the run in {str(workdir)!r} has taken {step} steps; allowed are "
            f"whole numbers from {math.ceil(step / config.steps_per_epoch)}"
        )


def _write_report(run: RunRecord) -> None:
    try:
        write_text(run.workdir / names.REPORT, run_page(run))
    except Exception as error:  # the result of a long run is not lost over its report
        _LOGGER.warning("there is no report: %s; try `python -m granq_jax.report %s`", error, run.workdir)
