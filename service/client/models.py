"""Jobs as a client reads them: the service's own schemas, open for what a newer service may add to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ValidationError, WrapValidator

from rewriter import QatError
from service.errors import AnyErrorCode, Cause
from service.jobs import schemas
from service.jobs.schemas import JobInputs, JobRequest
from service.jobs.states import JobKind


def _or_as_it_is(value: Any, validate: Callable[[Any], Any]) -> Any:
    """What this version does not know is left as it came."""
    try:
        return validate(value)
    except (ValidationError, QatError):
        return value


_Open = WrapValidator(_or_as_it_is)


class Failure(Cause):
    """Why a job failed."""

    code: Annotated[AnyErrorCode, _Open]


class JobSummary(schemas.JobSummary):
    """A job and where it stands, without its recipe. A kind, code or request that this version does not know
    is plain JSON.
    """

    kind: Annotated[JobKind, _Open]
    failure: Failure | None
    request: Annotated[JobInputs, _Open]


class Job(JobSummary):
    """The same with its whole request."""

    request: Annotated[JobRequest, _Open]


class JobPage(schemas.JobPage):
    """Some jobs, the newest first."""

    items: list[JobSummary]  # type: ignore[assignment]
