"""What a run remembers beside its state: it goes into every checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from granq_jax.distill import guard
from granq_jax.runs.accuracy import Accuracy


@dataclasses.dataclass(kw_only=True)
class RunNotes:
    """What a run remembers beside its :class:`~granq_jax.distill.trainer.TrainState`.

    Attributes:
      teacher: a digest of the teacher's variables.
      teacher_accuracy: ``None`` if nothing is evaluated.
      accuracy_before: of the quantized student before its training.
      evaluations: accuracy of the student by step.
      scores: of the guard, by step.
      skipped_steps: steps that were left out.
      compile_seconds: spent compiling.
      seconds_per_step: of every stretch between two lines of metrics.
      seconds: since the run began, without pauses.
      metrics_size: bytes of ``metrics.jsonl``.
    """

    teacher: str
    teacher_accuracy: Accuracy | None = None
    accuracy_before: Accuracy | None = None
    evaluations: dict[int, Accuracy] = dataclasses.field(default_factory=dict)
    scores: dict[int, guard.Score] = dataclasses.field(default_factory=dict)
    skipped_steps: int = 0
    compile_seconds: float = 0.0
    seconds_per_step: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    metrics_size: int = 0

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, the first of equal ones."""
        return max(self.evaluations, key=lambda step: self.evaluations[step].top1, default=None)

    @property
    def chosen_step(self) -> int | None:
        """The step of the student that the run would give now, by the guard; ``None`` where it has seen none."""
        return guard.chosen(self.scores)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        evaluations = {str(step): list(accuracy) for step, accuracy in self.evaluations.items()}
        scores = {str(step): list(score) for step, score in self.scores.items()}
        return {**dataclasses.asdict(self), "evaluations": evaluations, "scores": scores}

    @classmethod
    def from_json(cls, notes: dict[str, Any]) -> RunNotes:
        """The inverse of :meth:`to_json`.

        Examples:
          >>> notes = RunNotes(teacher="0", evaluations={20: Accuracy(91.0, 99.5)})
          >>> RunNotes.from_json(notes.to_json()) == notes
          True
        """
        one = {key: notes[key] and Accuracy(*notes[key]) for key in ("teacher_accuracy", "accuracy_before")}
        evaluations = {int(step): Accuracy(*values) for step, values in notes["evaluations"].items()}
        return cls(**{**notes, **one, "evaluations": evaluations, "scores": guard.scores_of(notes)})
