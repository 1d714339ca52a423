"""What a client raises: the service refuses, a job fails, nobody answers, a file does not arrive whole."""

from __future__ import annotations

import json

import httpx

from service.client.models import JobSummary


class ClientError(Exception):
    """Anything that keeps a client from its result."""


class UnreachableError(ClientError):
    """The service does not answer, however often it was asked, or something else does in its place."""


class DownloadError(ClientError):
    """What arrived is not the file that the service described."""


class ApiError(ClientError):
    """The service's answer is an error.

    Attributes:
        status: the HTTP status.
        code: stable identifier of the cause; None when something between here and the service answered.
        detail: what is wrong and what to do about it.
        node, field, file: the graph node, the field or the file concerned, if there is one.
        request_id: by which the service's log names the request.
        retry_after: the Retry-After header.
    """

    def __init__(self, answer: httpx.Response) -> None:
        """`answer` must have been read."""
        problem = _problem(answer)
        self.status = answer.status_code
        self.code: str | None = problem.get("code")
        self.detail: str = problem.get("detail") or f"{_described(answer)}."
        self.node: str | None = problem.get("node")
        self.field: str | None = problem.get("field")
        self.file: str | None = problem.get("file")
        self.request_id: str | None = answer.headers.get("X-Request-ID")
        self.retry_after: str | None = answer.headers.get("Retry-After")
        super().__init__(describe(self.code or f"http {self.status}", self.detail, **self._place))

    @property
    def _place(self) -> dict[str, str | None]:
        return {"node": self.node, "field": self.field, "file": self.file}


class JobFailed(ClientError):  # noqa: N818 (a job fails, the call does not)
    """A job ended without a result: it failed, or it was cancelled."""

    def __init__(self, job: JobSummary) -> None:
        self.job = job
        failure = job.failure
        self.code = None if failure is None else str(failure.code)
        self.detail = f"The job {job.id} was cancelled." if failure is None else failure.detail
        place = (
            {} if failure is None else {"node": failure.node, "field": failure.field, "file": failure.file}
        )
        super().__init__(describe(self.code or job.state.value, self.detail, **place))


def describe(code: str, detail: str, **place: str | None) -> str:
    """An error in one line, as the library's own errors are printed."""
    where = [f"{label} {value!r}" for label, value in place.items() if value is not None]
    return f"{detail} [{', '.join([code, *where])}]"


def _problem(answer: httpx.Response) -> dict[str, str]:
    """The texts of an RFC 9457 problem document; none when the answer is something else."""
    try:
        document = json.loads(answer.content)
    except ValueError:
        return {}
    if not isinstance(document, dict):
        return {}
    return {name: value for name, value in document.items() if isinstance(value, str)}


def failure(answer: httpx.Response) -> ApiError | UnreachableError:
    """What it means that an answer, which has been read, is not what was asked for."""
    if answer.is_error:
        return ApiError(answer)
    if "Location" in answer.headers:
        where = answer.headers["Location"]
        return UnreachableError(
            f"{_described(answer)}, which leads to {where}: use the service's own address."
        )
    content = answer.headers.get("Content-Type", "something")
    return UnreachableError(
        f"{_described(answer)} with {content}, which is not what the service says: is the address right?"
    )


def _described(answer: httpx.Response) -> str:
    return f"{answer.request.url} answered {answer.status_code} {answer.reason_phrase}".rstrip()
