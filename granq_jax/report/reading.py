"""What is known of a run: what its workdir holds, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from granq_jax.config import check_config, load_config, make_trainer
from granq_jax.errors import InputError
from granq_jax.report.inspection import Inspection, inspector
from granq_jax.runs import names
from granq_jax.runs.student import state_of_run
from granq_jax.runtime.paths import expanded
from granq_jax.teachers.load import teacher_of_run

REPORT = "report.html"


class RunRecord(NamedTuple):
    """A run, finished or not.

    Attributes:
      workdir: where it lies.
      config: its settings.
      starts: of each process that worked on it: ``time``, ``command``, ``directory``, ``versions``.
      metrics: the lines of ``metrics.jsonl``.
      result: of ``result.json``; empty while the run goes on.
      step: that the inspection is of.
      inspection: of the newest state.
    """

    workdir: Path
    config: ConfigDict
    starts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    step: int
    inspection: Inspection


def read_run(workdir: str | Path) -> RunRecord:
    """Reads a run's files and looks at its newest checkpoint; nothing is written.

    Raises:
      InputError: if there is no run with a checkpoint in ``workdir``, or its
        teacher cannot be had, or its ``result.json`` is damaged.
      RunError: if all of its checkpoints are damaged.
    """
    workdir = expanded(workdir, "workdir")
    if not (workdir / names.CONFIG).is_file():
        raise InputError(f"workdir: got {str(workdir)!r}, but there is no run in it (no config.json)")
    config = load_config(workdir / names.CONFIG)
    check_config(config)
    trainer = make_trainer(config)
    step, state = state_of_run(trainer, workdir)
    inspection = inspector(trainer, teacher_of_run(config, workdir))(state)
    return run_record(workdir, config, _result(workdir / names.RESULT), step, inspection)


def run_record(
    workdir: Path, config: ConfigDict, result: dict[str, Any], step: int, inspection: Inspection
) -> RunRecord:
    """The record of a run whose result and state are at hand; the rest is read from ``workdir``."""
    return RunRecord(
        workdir, config, _lines(workdir / names.STARTS), _lines(workdir / names.METRICS), result, step, inspection
    )


def _result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise InputError(f"workdir: {str(path)!r} is damaged; the run's own command writes it again")
    return result


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the last one, of a process that was killed
            continue
    return lines
