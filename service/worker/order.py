"""What passes between the supervisor and a job's process: the order as a file, reports as lines of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rewriter import Recipe
from service.errors import Cause
from service.worker.limits import Limits

RESULT_DIRECTORY = "result"
"""Where the job's process puts what it made, in the scratch directory."""
BUNDLE_FILE = "bundle.zip"
"""Name, in the result directory, of the zip of all files."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrepareWork(_Message):
    kind: Literal["prepare"] = "prepare"
    model: Path
    recipe: Recipe = Recipe()
    calibration: Path | None = None

    @property
    def inputs(self) -> list[Path]:
        """What the job reads; external data lies beside the model."""
        return [path for path in (self.model.parent, self.calibration) if path is not None]


class FinalizeWork(_Message):
    kind: Literal["finalize"] = "finalize"
    bundle: Path
    checkpoint: Path | None = None
    verify: Path | None = None

    @property
    def inputs(self) -> list[Path]:
        """What the job reads."""
        return [path for path in (self.bundle, self.checkpoint, self.verify) if path is not None]


Work = Annotated[PrepareWork | FinalizeWork, Field(discriminator="kind")]


class Order(_Message):
    """One job to do."""

    job: str
    work: Work
    limits: Limits
    inputs: list[Path] = Field(description="what the process may read")
    private: Path = Field(description="what it may not, even where it lies in a directory that it may")
    supervisor_pid: int
    report_descriptor: int = Field(description="file descriptor to write reports to")


class ProgressReport(_Message):
    """The job got so far."""

    type: Literal["progress"] = "progress"
    stage: str = Field(max_length=100)
    fraction: float = Field(ge=0, le=1)


class OutcomeReport(_Message):
    """The job's process is done; without a failure its result is complete."""

    type: Literal["outcome"] = "outcome"
    failure: Cause | None = None


Report = Annotated[ProgressReport | OutcomeReport, Field(discriminator="type")]
