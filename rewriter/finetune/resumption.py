"""Checkpoints from which a run goes on as if it had never stopped.

Such a file is a checkpoint of onnxruntime-training with the state of the optimizer, which holds the weights,
the moments and their step count, and what the training graph itself updates: counter, ranges, running
statistics. A property of it says which run it is of and how far that is. The gradients of an accumulation
are in no checkpoint: files are written between two optimizer steps only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, Final, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from rewriter.errors import ErrorCode, QatError
from rewriter.finetune.evaluation import Evaluation
from rewriter.inference import reason
from rewriter.installation import Device, training_build
from rewriter.recipe import OptimizerName
from rewriter.training.checkpoint import IDENTITY, of_another_bundle
from rewriter.training.runtime import TrainingSession


class Run(BaseModel):
    """All that decides the parameters after each step, but for the bundle, which a checkpoint names itself.

    `data`: SHA-256 of the training samples' file. `batch_size`: as it is, not as it was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    epochs: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup: int
    seed: int
    optimizer: OptimizerName
    device: Device


@dataclasses.dataclass
class Position:
    """How far a run is, and what it has to report so far.

    Attributes:
        step: optimizer steps done.
        losses: mean training loss of each epoch that is over.
        total: sum of the losses in the epoch that is not.
        before: evaluation before the first step.
    """

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    total: float = 0.0
    before: Evaluation | None = None


class _Record(BaseModel):
    # An evaluation before the training may have any loss.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    version: Literal[1] = 1
    run: Run
    position: Position


_PROPERTY: Final = "onnx_qat_finetune"


def describe_run(session: TrainingSession, run: Run, position: Position) -> None:
    """Put both into the checkpoint that the session saves next."""
    record = _Record(run=run, position=position)
    session.state.properties[_PROPERTY] = record.model_dump_json()


def resume_from(path: pathlib.Path, run: Run, identity: str) -> Position:
    """The position in a resumable checkpoint.

    Args:
        run: the one that goes on.
        identity: of the bundle.

    Raises:
        QatError: `resume_unavailable` when there is no such file, or no such record in it; `resume_mismatch`,
            naming what differs, when it is of another run; `checkpoint_invalid`.
    """
    if not path.is_file():
        raise QatError(
            ErrorCode.RESUME_UNAVAILABLE,
            f"There is nothing to resume: no interrupted run has written {path}.",
            file=path.name,
        )
    with _reading(path):
        state = _load(path)
        if state.has_property(IDENTITY) and state.get_property(IDENTITY) != identity:
            raise of_another_bundle(path)
        text = state.get_property(_PROPERTY) if state.has_property(_PROPERTY) else None
    try:
        record = None if text is None else _Record.model_validate_json(text)
    except pydantic.ValidationError:
        record = None  # of another version
    if record is None:
        raise QatError(
            ErrorCode.RESUME_UNAVAILABLE,
            f"{path.name} does not say which run it is of, so that none can go on from it: take it as the "
            "checkpoint that a new run starts from.",
            file=path.name,
        )
    for field in Run.model_fields:
        was, now = getattr(record.run, field), getattr(run, field)
        if was != now:
            values = "" if field == "data" else f" ({was!r} there, {now!r} now)"
            raise QatError(
                ErrorCode.RESUME_MISMATCH,
                f"{path.name} is of a run with other {field}{values}: resume with the same, or take it as "
                "the checkpoint that a new run starts from.",
                field=field,
                file=path.name,
            )
    return record.position


@contextlib.contextmanager
def weights_of(checkpoint: pathlib.Path) -> Iterator[pathlib.Path]:
    """A checkpoint without the state of an optimizer, in a temporary directory.

    The optimizer goes on from what it finds in a checkpoint, and says nothing.
    """
    native = training_build()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, checkpoint.name)
        with _reading(checkpoint):
            native.save_checkpoint(_load(checkpoint), str(path), False)
        yield path


def _load(path: pathlib.Path) -> Any:
    return training_build().load_checkpoint(str(path))


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, UnicodeDecodeError) as error:  # a damaged one may load
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"{path.name} is not a checkpoint of onnxruntime-training 1.19: {reason(error)}",
            file=path.name,
        ) from error
