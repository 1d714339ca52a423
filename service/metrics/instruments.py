"""What the service counts and measures, for Prometheus: one of each in a process.

Values of labels come from fixed sets, so that no client and no model can make more of them: never an id, a
path, or a name that somebody chose.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Final

from prometheus_client import Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase

from service.errors import AnyErrorCode, ServiceErrorCode
from service.jobs.states import JobKind, JobState
from service.uploads.kinds import UploadKind

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nothing here needs

_REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_JOB_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_SIZES: Final = tuple(float(1 << shift) for shift in range(10, 36, 3))  # 1 KiB to 16 GiB

REQUESTS: Final = Counter(
    "onnx_qat_http_requests",
    "Requests by what they were answered",
    ["method", "route", "status"],
    registry=None,
)
REQUEST_SECONDS: Final = Histogram(
    "onnx_qat_http_request_seconds",
    "Time until a request was answered in full",
    ["method", "route"],
    buckets=_REQUEST_SECONDS,
    registry=None,
)
REQUEST_BYTES: Final = Counter(
    "onnx_qat_http_request_bytes", "Bytes of the bodies of requests", ["route"], registry=None
)
RESPONSE_BYTES: Final = Counter(
    "onnx_qat_http_response_bytes", "Bytes of the bodies of answers", ["route"], registry=None
)
REQUESTS_IN_PROGRESS: Final = Gauge(
    "onnx_qat_http_requests_in_progress", "Requests that are being answered", registry=None
)
UPLOAD_BYTES: Final = Histogram(
    "onnx_qat_upload_bytes", "Sizes of uploads, all files together", ["kind"], buckets=_SIZES, registry=None
)
JOBS_SUBMITTED: Final = Counter(
    "onnx_qat_jobs_submitted",
    "Submissions: of new work, of work that a job did or does already, and again after a failure",
    ["kind", "how"],
    registry=None,
)
JOBS_FINISHED: Final = Counter(
    "onnx_qat_jobs_finished",
    "Jobs that have ended, failed ones with the code of the cause",
    ["kind", "state", "code"],
    registry=None,
)
JOBS_REQUEUED: Final = Counter(
    "onnx_qat_jobs_requeued",
    "Running jobs that were put back: their worker was lost, or ended, or a server did not answer",
    ["reason"],
    registry=None,
)
WORKERS_LOST: Final = Counter(
    "onnx_qat_workers_lost", "Running jobs whose worker showed no life any more", registry=None
)
WAIT_SECONDS: Final = Histogram(
    "onnx_qat_job_wait_seconds",
    "Time from submission to the first start",
    ["kind"],
    buckets=_JOB_SECONDS,
    registry=None,
)
JOB_SECONDS: Final = Histogram(
    "onnx_qat_job_seconds",
    "Time from the last start to the end",
    ["kind", "state"],
    buckets=_JOB_SECONDS,
    registry=None,
)
STAGE_SECONDS: Final = Histogram(
    "onnx_qat_job_stage_seconds", "Time in a stage", ["kind", "stage"], buckets=_JOB_SECONDS, registry=None
)
WEBHOOKS: Final = Counter(
    "onnx_qat_webhook_attempts", "Attempts to deliver a webhook by their outcome", ["outcome"], registry=None
)
WORKERS: Final = Gauge("onnx_qat_workers", "Jobs that this process may run at the same time", registry=None)
BUILD: Final = Info("onnx_qat_build", "What is running", registry=None)
BUILD.info({"version": importlib.metadata.version("onnx-qat"), "python": platform.python_version()})

INSTRUMENTS: Final[tuple[MetricWrapperBase, ...]] = (
    REQUESTS,
    REQUEST_SECONDS,
    REQUEST_BYTES,
    RESPONSE_BYTES,
    REQUESTS_IN_PROGRESS,
    UPLOAD_BYTES,
    JOBS_SUBMITTED,
    JOBS_FINISHED,
    JOBS_REQUEUED,
    WORKERS_LOST,
    WAIT_SECONDS,
    JOB_SECONDS,
    STAGE_SECONDS,
    WEBHOOKS,
    WORKERS,
    BUILD,
)

# So that a rate is there from the first one on.
for _kind in JobKind:
    for _state in (JobState.SUCCEEDED, JobState.CANCELLED):
        JOBS_FINISHED.labels(_kind.value, _state.value, "")
    for _code in ServiceErrorCode:  # the service's own failures, which alerts go by
        if _code.startswith("worker_") or _code in (
            ServiceErrorCode.INTERNAL_ERROR,
            ServiceErrorCode.STORAGE_FULL,
        ):
            JOBS_FINISHED.labels(_kind.value, JobState.FAILED.value, _code.value)
for _upload_kind in UploadKind:
    UPLOAD_BYTES.labels(_upload_kind.value)
for _reason in ("worker_lost", "returned"):
    JOBS_REQUEUED.labels(_reason)
for _outcome in ("delivered", "failed", "given_up"):
    WEBHOOKS.labels(_outcome)


def job_finished(kind: JobKind, state: JobState, code: AnyErrorCode | None, seconds: float | None) -> None:
    """A job has ended; `seconds` is how long it ran, if it did in this process."""
    JOBS_FINISHED.labels(kind.value, state.value, code or "").inc()
    if seconds is not None:
        JOB_SECONDS.labels(kind.value, state.value).observe(max(0.0, seconds))
