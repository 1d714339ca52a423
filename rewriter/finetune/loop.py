"""The loop: steps, and what comes between them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.calibration.npz import Batch
from rewriter.errors import ErrorCode, QatError
from rewriter.finetune.batches import Plan, take
from rewriter.finetune.evaluation import Evaluation, HeldOut, Scoring, evaluate
from rewriter.finetune.phases import Delays, Phase
from rewriter.finetune.records import Journal
from rewriter.finetune.resumption import Position, Run, describe_run
from rewriter.finetune.schedule import applied_rate, learning_rate
from rewriter.manifest import Manifest
from rewriter.progress import Progress
from rewriter.training.derived import derived_values, require_scales
from rewriter.training.runtime import TrainingSession
from rewriter.training.trained_values import require_finite


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one step of the optimizer was: mean loss, samples, learning rate of the schedule."""

    loss: float
    samples: int
    rate: float


def _steps(session: TrainingSession, arrays: Batch, plan: Plan, run: Run, done: int) -> Iterator[_Step]:
    """Take the steps after the first `done`, one each time the next is asked for."""
    module, optimizer = session.module, session.optimizer
    for step, batches in enumerate(plan.steps_after(done), start=done):
        module.train()
        losses = []
        for chosen in batches:
            losses.append(float(np.ravel(module(*take(arrays, chosen)))[0]))
            _require_finite(losses[-1], f"at step {step + 1} of {plan.steps}")
        rate = learning_rate(step, plan.steps, run.learning_rate, run.warmup)
        optimizer.set_learning_rate(applied_rate(rate, run.optimizer, run.accumulate))
        optimizer.step()
        module.lazy_reset_grad()
        yield _Step(sum(losses) / len(losses), sum(map(len, batches)), rate)


@dataclasses.dataclass(frozen=True)
class Training:
    """A run, from its position to its end.

    Attributes:
        model: the eval model.
        held_out: samples to evaluate on, before the first step and every `eval_every` steps; None of the
            latter: every epoch.
        stop: asked after every step and every batch of an evaluation whether to write `state_file` and end.
        save_every: steps between two resumable checkpoints in `state_file`; None: none but at a stop.
    """

    session: TrainingSession
    model: ir.Model
    manifest: Manifest
    arrays: Batch
    plan: Plan
    run: Run
    held_out: HeldOut | None
    scoring: Scoring | None
    journal: Journal
    progress: Progress
    stop: Callable[[], bool]
    eval_every: int | None
    save_every: int | None
    state_file: pathlib.Path

    def go(self, position: Position) -> Evaluation | None:
        """Train; the evaluation of what came out.

        Raises:
            QatError: `training_diverged`, `training_interrupted`, `output_unwritable`.
        """
        phase_after = self._phases(position.step)
        result = None
        if position.step == 0:
            position.before = self._evaluate(position, phase_after(0))
        self.progress("train", position.step / self.plan.steps)
        started = time.perf_counter()
        for step in _steps(self.session, self.arrays, self.plan, self.run, position.step):
            seconds = time.perf_counter() - started
            self._count(position, step)
            done, phase = position.step, phase_after(position.step)
            ends_epoch = self.plan.ends_epoch(done)
            epoch = self.plan.epoch_of(done)
            self.journal.step(done, epoch, step.loss, step.rate, seconds, phase, last=ends_epoch)
            self.progress("train", done / self.plan.steps)
            due = ends_epoch if self.eval_every is None else done % self.eval_every == 0
            result = self._evaluate(position, phase) if due else None
            if self.save_every is not None and done % self.save_every == 0:
                self._save(position)
            if self.stop():
                self._interrupt(position)
            started = time.perf_counter()
        self._require_converged()
        self._require_finite_evaluation()
        return result or self._evaluate(position, phase_after(position.step))

    def _phases(self, start: int) -> Callable[[int], Phase]:
        """The phase after so many steps.

        The counter is read once: the training graph counts, maybe on another device, and to read what it has
        counted would wait for that, each time.
        """
        counter = self.manifest.training.step_counter
        if counter.state not in self.session.state.parameters:
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The checkpoint has no step counter {counter.state!r}.",
                field=counter.state,
            )
        counted = int(np.ravel(self.session.state.parameters[counter.state].data)[0])
        each = self.run.accumulate if counter.counts == "executions" else 1
        delays = Delays.of(self.manifest)
        return lambda step: delays.phase(counted + (step - start) * each)

    def _count(self, position: Position, step: _Step) -> None:
        position.step += 1
        position.total += step.loss * step.samples
        if self.plan.ends_epoch(position.step):
            position.losses.append(position.total / self.plan.samples_per_epoch)
            position.total = 0.0

    def _evaluate(self, position: Position, phase: Phase) -> Evaluation | None:
        if self.held_out is None:
            return None
        result = evaluate(self.session, self.held_out, self.scoring, self.stop)
        if result is None:
            self._interrupt(position)
        self.journal.evaluation(position.step, self.plan.epoch_of(position.step), result, phase)
        return result

    def _save(self, position: Position) -> None:
        with _diverged():  # nothing comes of going on from there
            require_finite(self.manifest, self._parameters())
        describe_run(self.session, self.run, position)
        self.session.save(self.state_file, optimizer_state=True)

    def _interrupt(self, position: Position) -> NoReturn:
        self._save(position)
        raise QatError(
            ErrorCode.TRAINING_INTERRUPTED,
            f"Stopped after step {position.step} of {self.plan.steps}: resume goes on from "
            f"{self.state_file}.",
            file=self.state_file.name,
        )

    def _require_finite_evaluation(self) -> None:
        self.session.module.eval()
        outputs = self.session.module(*take(self.arrays, slice(0, self.plan.batch_size)))
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        _require_finite(float(np.ravel(loss)[0]), "at the end")

    def _require_converged(self) -> None:
        """The loss of a step says nothing of what this step makes of the parameters."""
        sources = {entry.scale: entry.scale_parameter or entry.scale for entry in self.manifest.quantizers}
        parameters = self._parameters()
        with _diverged():
            require_finite(self.manifest, parameters)
            scales = derived_values(self.model, parameters, sources)
            require_scales(scales, {name: sources[name] for name in scales})

    def _parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: parameter.data for name, parameter in self.session.state.parameters}


@contextlib.contextmanager
def _diverged() -> Iterator[None]:
    """What is wrong with a parameter here, the training has made wrong."""
    try:
        yield
    except QatError as error:
        raise QatError(
            ErrorCode.TRAINING_DIVERGED,
            f"After the last step the parameter {error.field!r} is not finite, or makes a scale that is 0 or "
            "not finite: use a smaller learning rate.",
            field=error.field,
        ) from error


def _require_finite(loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise QatError(
            ErrorCode.TRAINING_DIVERGED, f"The loss is {loss} {when}: use a smaller learning rate."
        )
