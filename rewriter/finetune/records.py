"""What a training run says of itself while it runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Literal

from rewriter.finetune.evaluation import Evaluation
from rewriter.finetune.phases import Phase


@dataclasses.dataclass(frozen=True)
class LogRecord:
    """One line of the log of a training run.

    Attributes:
        event: "step": of training; "evaluation": of the held-out samples, after that step.
        step: optimizer steps done, of `steps`.
        epoch: the one that the step belongs to, of `epochs`.
        loss: mean of the steps since the record of a step before, or that of the evaluation.
        accuracy: of an evaluation of a cross-entropy model, 0..1; else None.
        learning_rate: of this step; None before the first.
        steps_per_second: of training since the record of a step before, without what evaluations and
            checkpoints take; None in an evaluation.
        phase: of this step, or of the evaluation.
    """

    event: Literal["step", "evaluation"]
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float | None
    learning_rate: float | None
    steps_per_second: float | None
    phase: Phase

    def figures(self) -> str:
        """What was measured, for a person."""
        parts = [f"loss {self.loss:.4f}"]
        if self.accuracy is not None:
            parts.append(f"top-1 {100 * self.accuracy:.2f} %")
        if self.steps_per_second is not None:
            pace = f"{self.steps_per_second:.{0 if self.steps_per_second >= 100 else 1}f}"
            parts += [f"lr {self.learning_rate:.2e}", f"{pace} steps/s"]
        return "  ".join([*parts, str(self.phase)])

    def __str__(self) -> str:
        """One line for a person."""
        width = len(str(self.steps))
        what = "evaluation  " if self.event == "evaluation" else ""
        return (
            f"epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}  "
            f"step {self.step:>{width}}/{self.steps}  {what}{self.figures()}"
        )

    def to_json(self) -> str:
        """One line for a machine: the attributes, the phase in words and in numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(fields | {"phase": str(self.phase)} | dataclasses.asdict(self.phase))


# Called with each record when it is made.
Log = Callable[[LogRecord], None]


def unlogged(record: LogRecord) -> None:
    """The log of a caller who does not ask for any."""


class Journal:
    """Makes the records of one run: at every `every`-th step, at the end of an epoch, and where the phase
    changes, the first step of the run included."""

    def __init__(self, log: Log, steps: int, epochs: int, every: int) -> None:
        self._log = log
        self._steps = steps
        self._epochs = epochs
        self._every = every
        self._losses: list[float] = []
        self._seconds = 0.0
        self._phase: Phase | None = None
        self._learning_rate: float | None = None

    def step(
        self, step: int, epoch: int, loss: float, rate: float, seconds: float, phase: Phase, *, last: bool
    ) -> None:
        """After each step.

        Args:
            seconds: what the step took.
            last: whether it is the last one of its epoch.
        """
        self._losses.append(loss)
        self._seconds += seconds
        self._learning_rate = rate
        if not (last or step % self._every == 0 or phase != self._phase):
            return
        self._phase = phase
        count = len(self._losses)
        self._log(
            LogRecord(
                event="step",
                step=step,
                steps=self._steps,
                epoch=epoch,
                epochs=self._epochs,
                loss=sum(self._losses) / count,
                accuracy=None,
                learning_rate=rate,
                steps_per_second=count / self._seconds,
                phase=phase,
            )
        )
        self._losses, self._seconds = [], 0.0

    def evaluation(self, step: int, epoch: int, result: Evaluation, phase: Phase) -> None:
        """After each evaluation."""
        self._log(
            LogRecord(
                event="evaluation",
                step=step,
                steps=self._steps,
                epoch=epoch,
                epochs=self._epochs,
                loss=result.loss,
                accuracy=result.accuracy,
                learning_rate=self._learning_rate,
                steps_per_second=None,
                phase=phase,
            )
        )
