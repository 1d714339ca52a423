"""Jobs as they cross the wire."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WrapSerializer

from rewriter import ErrorCode, QatError, Recipe
from service.errors import Cause
from service.jobs.states import JobKind, JobState
from service.uploads.schemas import StoredFile, UploadId
from service.webhooks.schemas import Webhook

JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$"), Field(description="id of a job")]


def parse_recipe(value: Any) -> Recipe:
    """Validate with the library's own errors, so that HTTP answers with the codes of the command line."""
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, Mapping | bytes):
        raise QatError(ErrorCode.RECIPE_INVALID, "The recipe is not a JSON object.", field="recipe")
    return Recipe.parse(value)


RecipeField = Annotated[
    Recipe,
    BeforeValidator(parse_recipe),
    # One that is none of this version's is told as it was submitted (service.py, `job_of`).
    WrapSerializer(lambda recipe, write: write(recipe) if isinstance(recipe, Recipe) else recipe),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PrepareInputs(_Request):
    """What a prepare job works on; the recipe is at `GET /v1/jobs/{id}`."""

    kind: Literal[JobKind.PREPARE]
    model: UploadId
    calibration: UploadId | None = Field(default=None, description="data set to calibrate with")


class PrepareRequest(PrepareInputs):
    """Make a trainable bundle from a float model."""

    recipe: RecipeField = Recipe()


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


JobRequest = Annotated[PrepareRequest | FinalizeRequest, Field(discriminator="kind")]
JobInputs = Annotated[PrepareInputs | FinalizeRequest, Field(discriminator="kind")]
"""Of a request what is small: recipes in a list of jobs would be most of it."""


class _Submission(BaseModel):
    """What is said of the wish for a job, not of the work: it does not tell one job from another."""

    webhook: Webhook | None = Field(default=None, description="whom to tell of the job; kept secret")


class PrepareSubmission(PrepareRequest, _Submission):
    """Make a trainable bundle from a float model."""


class FinalizeSubmission(FinalizeRequest, _Submission):
    """Make the int8 model from a bundle and a checkpoint."""


SubmittedRequest = Annotated[PrepareSubmission | FinalizeSubmission, Field(discriminator="kind")]


class Progress(BaseModel):
    """How far a job is."""

    stage: str | None = Field(description="what is being done; null before the start")
    fraction: float = Field(ge=0, le=1, description="share of the stage that is done")


class JobSummary(BaseModel):
    """A job and where it stands, as lists and events tell it: without its recipe."""

    id: JobId
    kind: JobKind
    state: JobState
    progress: Progress
    failure: Cause | None = Field(description="why the job failed")
    request: JobInputs
    files: list[StoredFile] = Field(description="what a succeeded job made: files/NAME")
    bundle: StoredFile | None = Field(description="all files as one zip, for a job that made a bundle")
    attempt: int = Field(description="how often the job was started; more than once after a worker was lost")
    revision: int = Field(description="rises with each change")
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    retry_of: str | None = Field(description="id of the job that was retried with this one")
    expires_at: datetime.datetime | None = Field(
        description="when a finished job and its files are removed; null: not by itself"
    )


class Job(JobSummary):
    """A job and where it stands."""

    request: JobRequest


class JobPage(BaseModel):
    """Some jobs, the newest first."""

    items: list[JobSummary]
    next: int | None = Field(description="cursor of the next page; null when this is the last")
