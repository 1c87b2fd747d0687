"""The loop of a run: joint steps, and between them evaluation, guard, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from granq_jax.config import make_dataset
from granq_jax.data.splits import Split
from granq_jax.distill import guard
from granq_jax.distill.joint_run import JointRun, NonFiniteError
from granq_jax.distill.trainer import TrainState, Variables, evaluation_mode
from granq_jax.errors import RunError
from granq_jax.files.writing import write_bytes
from granq_jax.quant import Shares, quantize
from granq_jax.report import Inspection, image_grid, inspector
from granq_jax.runs import names
from granq_jax.runs.accuracy import Evaluation, float_accuracy, student_accuracy
from granq_jax.runs.checkpoint import Checkpoints
from granq_jax.runs.metrics import MetricsLog
from granq_jax.runs.notes import RunNotes
from granq_jax.runtime.processes import from_first, is_first, together
from granq_jax.runtime.stopping import Interrupted, Interruption


class Loop:
    """Takes the steps of a run, and does what is due after each: metrics, evaluations, checkpoints."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        run: JointRun,
        notes: RunNotes,
        checkpoints: Checkpoints,
        interruption: Interruption,
    ):
        self._config = config
        self._workdir = workdir
        self._run = run
        self._notes = notes
        self._checkpoints = checkpoints
        self._interruption = interruption
        self._total = config.epochs * config.steps_per_epoch
        self._warmup = config.warmup_epochs * config.steps_per_epoch
        self._score: Callable[[Variables], guard.Score] | None = None
        self._compiled_before = notes.compile_seconds

    def complete(self, teacher: Variables, split: Split | None) -> tuple[int, Inspection]:
        """Takes the steps that are left; returns the step whose student is the result, and a look at it."""
        config, notes, trainer, devices = self._config, self._notes, self._run.trainer, self._run.devices
        with MetricsLog(
            self._workdir,
            self._total,
            config.epochs,
            step=self._run.step,
            seconds=notes.seconds,
            size=notes.metrics_size,
        ) as self._log:
            if self._run.step:
                self._log.say(f"goes on after step {self._run.step} of {self._total}")
            self._log.say(str(self._shares(teacher)))
            evaluate = None
            if split is not None:
                evaluate = student_accuracy(trainer, split, config.eval_batch_size, devices)
                if notes.accuracy_before is None:
                    of_teacher = float_accuracy(
                        trainer.model, split, config.eval_batch_size, devices, trainer.precision
                    )
                    notes.teacher_accuracy, notes.accuracy_before = of_teacher(teacher), evaluate(teacher)
                    self._log.accuracy(
                        0,
                        teacher_top1=notes.teacher_accuracy.top1,
                        student_top1=notes.accuracy_before.top1,
                    )
                    self._log.say(
                        f"teacher {notes.teacher_accuracy.top1:.2f} %, "
                        f"student before training {notes.accuracy_before.top1:.2f} % top-1"
                    )
            if not self._warmup:
                self._log.say("no guard: config.warmup_epochs is 0, after which it would take its images")
            elif self._run.step > self._warmup:
                self._score = self._kept_guard(teacher)
            inspect = inspector(trainer, teacher)
            try:
                inspection = self._take_steps(teacher, evaluate, inspect)
            except Interrupted as interrupted:
                with together():
                    self._save()
                    self._checkpoints.wait()
                detail = f" after step {self._run.step}, which is saved: the same command goes on from there"
                raise Interrupted(interrupted.signal, detail) from None
            with together():
                self._checkpoints.wait()
            step = notes.chosen_step or self._run.step
            if step != self._run.step:
                self._log.say(f"the result is the student of step {step}, which the guard chose")
                inspection = inspect(self._checkpoints.of_step(step, self._run.state).state)
        return step, inspection

    def _shares(self, teacher: Variables) -> Shares:
        trainer = self._run.trainer
        size, channels = trainer.generator.image_size, trainer.generator.channels
        images = jax.ShapeDtypeStruct((1, size, size, channels), trainer.dtype)
        return quantize(trainer.model, trainer.spec).shares(teacher, images, **evaluation_mode(trainer.model))

    def _take_steps(
        self, teacher: Variables, evaluate: Evaluation | None, inspect: Callable[[TrainState], Inspection]
    ) -> Inspection:
        """The rest of the steps, up to a breakdown if that is to end the run; returns a look at the last state.

        Signals are held back where a checkpoint could not be taken at once.
        """
        config, run, notes, held_back = self._config, self._run, self._notes, self._interruption.held_back
        with held_back():
            self._save()
        window = _Window(run)
        with _Trace(config, self._workdir / names.TRACES) as trace:
            while True:
                epoch, into_epoch = divmod(run.step, config.steps_per_epoch)
                if run.step == self._warmup and self._warmup and self._score is None:
                    with held_back():
                        self._score = self._new_guard(teacher)
                due = run.step == self._total or (not into_epoch and epoch % config.eval_every_epochs == 0)
                if due and run.step > self._warmup:
                    self._look_at_score(epoch)
                last = run.step == self._total or self._ends_early
                if run.step and not into_epoch:
                    due = due or last
                    if evaluate is not None and due and run.step not in notes.evaluations:
                        accuracy = evaluate(run.state.result)
                        with held_back():
                            notes.evaluations[run.step] = accuracy
                            self._log.evaluation(run.step, epoch, accuracy.top1)
                    if due:
                        inspection = inspect(run.state)
                        self._log_inspection(inspection)
                    is_kept = run.step in self._kept_steps
                    if last or is_kept or epoch % config.checkpoint_every_epochs == 0:
                        with held_back():
                            self._save()
                    window = _Window(run)
                if last:
                    return inspection
                with held_back():
                    with trace.step(run):
                        metrics = run.advance(warmup=epoch < config.warmup_epochs)
                    if run.step % config.log_every_steps == 0 or run.step % config.steps_per_epoch == 0:
                        self._check()
                        # By way of its text a float32 becomes the shortest number that means it: 0.001.
                        values = {name: float(str(value)) for name, value in jax.device_get(metrics).items()}
                        notes.seconds_per_step.append(window.seconds_per_step())
                        self._log.train(
                            run.step, run.step // config.steps_per_epoch, values, notes.seconds_per_step[-1]
                        )
                        self._interruption.agree()
                        window = _Window(run)

    @property
    def _ends_early(self) -> bool:
        return self._config.on_breakdown == "stop" and guard.breakdown(self._notes.scores) is not None

    @property
    def _kept_steps(self) -> frozenset[int]:
        """The steps whose checkpoints are kept: of the best evaluation, and of the student that the guard chose."""
        best = self._notes.best_step if self._config.keep_best else None
        return frozenset(step for step in (best, self._notes.chosen_step) if step is not None)

    def _new_guard(self, teacher: Variables) -> Callable[[Variables], guard.Score]:
        images = from_first(lambda: guard.held_out_images(self._run.trainer, self._run.state.generator))
        if is_first():
            write_bytes(self._workdir / names.HELD_OUT, safetensors.numpy.save({"images": images}))
        return guard.scorer(self._run.trainer, teacher, images)

    def _kept_guard(self, teacher: Variables) -> Callable[[Variables], guard.Score] | None:
        def read():
            try:
                return safetensors.numpy.load_file(self._workdir / names.HELD_OUT)["images"]
            except (OSError, KeyError, safetensors.SafetensorError) as error:
                self._log.say(f"no guard from here on: the run's {names.HELD_OUT} cannot be read ({error})")
                return None

        images = from_first(read)
        return None if images is None else guard.scorer(self._run.trainer, teacher, images)

    def _look_at_score(self, epoch: int) -> None:
        """Has the guard look at the student as it is, once, and says if it has broken down."""
        step, scores, measure = self._run.step, self._notes.scores, self._score
        if measure is None or step in scores:
            return
        score = guard.Score(**from_first(lambda: measure(self._run.state.result)._asdict()))
        with self._interruption.held_back():
            scores[step] = score
            self._log.guard(step, epoch, **score._asdict())
            if guard.breakdown(scores) == step:
                chosen = self._notes.chosen_step
                self._log.say(
                    f"after epoch {epoch}: the student BREAKS DOWN: its error on held-out images is {score.error:.3f} "
                    f"of that before training, more than {guard.LIMIT:g} times the least before; "
                    + ("no student was seen before it" if chosen is None else f"the result is that of step {chosen}")
                    + ("" if self._ends_early else "; the run goes on, for config.on_breakdown is 'go_on'")
                )

    def _log_inspection(self, inspection: Inspection) -> None:
        self._log.images(self._run.step, image_grid(make_dataset(self._config).pixels(inspection.images)))
        for observation in inspection.observations:
            if observation.code_counts is not None:
                name = f"{observation.site.kind}/{observation.site.path}"
                self._log.codes(self._run.step, name, np.asarray(observation.code_counts))

    def _check(self) -> None:
        """Raises :class:`RunError` if a step was not finite or a checkpoint not written; counts what is skipped."""
        try:
            for skipped in self._run.check():
                self._notes.skipped_steps += 1
                self._log.say(f"step {skipped.step} is left out: {skipped.what} not finite")
        except NonFiniteError as error:
            self._checkpoints.wait()
            raise RunError(
                f"{error}; the newest checkpoint is of step {self._checkpoints.latest_step()}. Try a lower learning "
                "rate, or --config.on_nonfinite=skip to leave such steps out"
            ) from None
        self._checkpoints.check()

    def _save(self) -> None:
        self._check()
        notes = self._notes
        notes.compile_seconds = self._compiled_before + self._run.compile_seconds
        notes.seconds, notes.metrics_size = self._log.seconds, self._log.saved_size()
        self._checkpoints.kept_steps = self._kept_steps
        self._checkpoints.save(self._run.step, self._run.state, notes.to_json())


class _Window:
    """The time from now on, without what is spent compiling."""

    def __init__(self, run: JointRun):
        self._run = run
        self._step, self._compile_seconds = run.step, run.compile_seconds
        self._start = time.perf_counter()

    def seconds_per_step(self) -> float:
        elapsed = time.perf_counter() - self._start - (self._run.compile_seconds - self._compile_seconds)
        return elapsed / (self._run.step - self._step)


class _Trace:
    """A profiler trace of the steps that ``config.profile`` names."""

    def __init__(self, config: ConfigDict, directory: Path):
        steps = config.profile.steps if is_first() else 0
        self._steps = range(config.profile.start + 1, config.profile.start + steps + 1)
        self._directory = directory
        self._running = False

    @contextlib.contextmanager
    def step(self, run: JointRun) -> Iterator[None]:
        """Within, ``run`` takes one step."""
        number = run.step + 1
        if number in self._steps and not self._running:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._running = True
        with jax.profiler.StepTraceAnnotation("joint_step", step_num=number):
            yield
        if self._running and number + 1 not in self._steps:
            jax.block_until_ready(run.state)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
