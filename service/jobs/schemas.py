"""Jobs as they cross the wire."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from rewriter import ErrorCode, QatError, Recipe
from service.errors import Cause
from service.jobs.models import JobKind, JobState
from service.uploads.schemas import StoredFile, UploadId

JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$"), Field(description="id of a job")]


def parse_recipe(value: Any) -> Recipe:
    """Validate with the library's own errors, so that HTTP answers with the codes of the command line."""
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, Mapping | bytes):
        raise QatError(ErrorCode.RECIPE_INVALID, "The recipe is not a JSON object.", field="recipe")
    return Recipe.parse(value)


RecipeField = Annotated[Recipe, BeforeValidator(parse_recipe)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PrepareRequest(_Request):
    """Make a trainable bundle from a float model."""

    kind: Literal[JobKind.PREPARE]
    model: UploadId
    recipe: RecipeField = Recipe()
    calibration: UploadId | None = Field(default=None, description="data set to calibrate with")


class FinalizeRequest(_Request):
    """Make the int8 model from a bundle and a checkpoint."""

    kind: Literal[JobKind.FINALIZE]
    prepare_job: JobId = Field(description="the job that made the bundle")
    checkpoint: UploadId | None = Field(
        default=None, description="the trained checkpoint; null: the bundle's own, which is not trained"
    )
    verify: UploadId | None = Field(
        default=None, description="data set on which to compare the int8 model with the trained one"
    )


class InspectRequest(_Request):
    """Say what a recipe would do to a model. Not available in this version."""

    kind: Literal["inspect"]
    model: UploadId
    recipe: RecipeField = Recipe()


JobRequest = Annotated[PrepareRequest | FinalizeRequest, Field(discriminator="kind")]
SubmittedRequest = Annotated[PrepareRequest | FinalizeRequest | InspectRequest, Field(discriminator="kind")]


class Progress(BaseModel):
    """How far a job is."""

    stage: str | None = Field(description="what is being done; null before the start")
    fraction: float = Field(ge=0, le=1, description="share of the stage that is done")


class Job(BaseModel):
    """A job and where it stands."""

    id: JobId
    kind: JobKind
    state: JobState
    progress: Progress
    failure: Cause | None = Field(description="why the job failed")
    request: JobRequest
    files: list[StoredFile] = Field(description="what a succeeded job made: files/NAME")
    bundle: StoredFile | None = Field(description="all files as one zip, for a job that made a bundle")
    revision: int = Field(description="rises with each change")
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None


class JobPage(BaseModel):
    """Some jobs, the newest first."""

    items: list[Job]
    next: int | None = Field(description="cursor of the next page; null when this is the last")
