"""What can go wrong: the service's own codes beside the library's, and a cause as all interfaces show it."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from rewriter import ErrorCode, QatError


class ServiceErrorCode(enum.StrEnum):
    """Causes that only the service knows. Like the library's codes they are never renamed."""

    # The request.
    REQUEST_INVALID = "request_invalid"
    REQUEST_TOO_LARGE = "request_too_large"
    MEDIA_TYPE_UNSUPPORTED = "media_type_unsupported"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_FOUND = "not_found"
    RANGE_INVALID = "range_invalid"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"

    # Uploads.
    UPLOAD_ABORTED = "upload_aborted"
    UPLOAD_EMPTY = "upload_empty"
    FILE_NAME_INVALID = "file_name_invalid"
    CHECKPOINT_NOT_FOUND = "checkpoint_not_found"

    # Jobs.
    JOB_NOT_FOUND = "job_not_found"
    JOB_FINISHED = "job_finished"
    JOB_NOT_SUCCEEDED = "job_not_succeeded"
    JOB_KIND_UNAVAILABLE = "job_kind_unavailable"
    FILE_NOT_FOUND = "file_not_found"
    WORKER_CRASHED = "worker_crashed"
    WORKER_TIMEOUT = "worker_timeout"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"
    WORKER_OUTPUT_TOO_LARGE = "worker_output_too_large"

    # The service itself.
    NOT_READY = "not_ready"
    STORAGE_FULL = "storage_full"
    INTERNAL_ERROR = "internal_error"


AnyErrorCode = ErrorCode | ServiceErrorCode


class Cause(BaseModel):
    """Why something failed, for a program (code) and for a person (detail)."""

    model_config = ConfigDict(frozen=True)

    code: AnyErrorCode = Field(description="stable identifier of the cause")
    detail: str = Field(description="what is wrong and what to do about it")
    node: str | None = Field(default=None, description="graph node concerned")
    field: str | None = Field(default=None, description="request or recipe field, or graph input, concerned")
    file: str | None = Field(default=None, description="file concerned")

    @classmethod
    def of(cls, error: QatError) -> Cause:
        return cls(code=error.code, detail=error.message, node=error.node, field=error.field, file=error.file)


class ServiceError(Exception):
    """A request that the service cannot carry out."""

    def __init__(
        self,
        code: AnyErrorCode,
        detail: str,
        *,
        field: str | None = None,
        file: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.cause = Cause(code=code, detail=detail, field=field, file=file)
        self.headers = headers
