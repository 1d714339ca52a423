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
    PRECONDITION_FAILED = "precondition_failed"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"

    # Access.
    UNAUTHORIZED = "unauthorized"
    KEY_INVALID = "key_invalid"
    KEY_EXPIRED = "key_expired"
    KEY_REVOKED = "key_revoked"
    RATE_LIMITED = "rate_limited"
    STORAGE_QUOTA_EXCEEDED = "storage_quota_exceeded"
    JOB_QUOTA_EXCEEDED = "job_quota_exceeded"
    HOST_UNKNOWN = "host_unknown"
    CROSS_ORIGIN = "cross_origin"

    # Access, on the command line.
    AUTH_NOT_CHOSEN = "auth_not_chosen"
    TENANT_EXISTS = "tenant_exists"
    TENANT_NOT_FOUND = "tenant_not_found"
    KEY_NOT_FOUND = "key_not_found"

    # Settings, on the command line.
    SETTING_INVALID = "setting_invalid"
    DATA_DIRECTORY_IN_USE = "data_directory_in_use"
    METRICS_PORT_UNAVAILABLE = "metrics_port_unavailable"

    # Uploads.
    UPLOAD_ABORTED = "upload_aborted"
    UPLOAD_EMPTY = "upload_empty"
    UPLOAD_TIMEOUT = "upload_timeout"
    UPLOADS_BUSY = "uploads_busy"
    DIGEST_MISMATCH = "digest_mismatch"
    CONTENT_ENCODING_UNSUPPORTED = "content_encoding_unsupported"
    CONTENT_NOT_FOUND = "content_not_found"
    UPLOAD_NOT_FOUND = "upload_not_found"
    UPLOAD_EXPIRED = "upload_expired"
    UPLOAD_LOCKED = "upload_locked"
    UPLOAD_UNFINISHED = "upload_unfinished"
    UPLOAD_OFFSET_MISMATCH = "upload_offset_mismatch"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    TUS_VERSION_UNSUPPORTED = "tus_version_unsupported"
    FILE_NAME_INVALID = "file_name_invalid"
    CHECKPOINT_NOT_FOUND = "checkpoint_not_found"
    UPLOAD_IN_USE = "upload_in_use"

    # Jobs.
    JOB_NOT_FOUND = "job_not_found"
    JOB_FINISHED = "job_finished"
    JOB_NOT_FINISHED = "job_not_finished"
    JOB_NOT_RETRYABLE = "job_not_retryable"
    JOB_IN_USE = "job_in_use"
    JOB_NOT_SUCCEEDED = "job_not_succeeded"
    FILE_NOT_FOUND = "file_not_found"
    EVENT_STREAMS_EXCEEDED = "event_streams_exceeded"
    WORKER_CRASHED = "worker_crashed"
    WORKER_TIMEOUT = "worker_timeout"
    WORKER_LOST = "worker_lost"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"
    WORKER_OUTPUT_TOO_LARGE = "worker_output_too_large"

    # Webhooks.
    WEBHOOK_URL_REFUSED = "webhook_url_refused"
    WEBHOOK_SECRET_MISSING = "webhook_secret_missing"
    WEBHOOK_LIMIT_REACHED = "webhook_limit_reached"
    DELIVERY_NOT_FOUND = "delivery_not_found"

    # The service itself.
    NOT_READY = "not_ready"
    DATABASE_UNAVAILABLE = "database_unavailable"
    STORE_UNAVAILABLE = "store_unavailable"
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
