"""Examples in the OpenAPI document: of every parameter, of what is sent and answered, and of every error.

They are made of the service's own types, so that they cannot fall behind them.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from rewriter import ErrorCode, Recipe
from service.errors import AnyErrorCode, Cause, ServiceErrorCode
from service.jobs.schemas import (
    FinalizeRequest,
    Job,
    JobPage,
    JobSummary,
    PrepareInputs,
    PrepareRequest,
    Progress,
)
from service.jobs.states import JobKind, JobState
from service.tenants.schemas import TenantStatus, Usage
from service.uploads.kinds import FILE_NAMES, UploadKind
from service.uploads.schemas import StoredFile, Upload
from service.webhooks.schemas import (
    Delivery,
    DeliveryList,
    NewWebhookSecret,
    WebhookEvent,
    WebhookSecret,
)
from service.webhooks.states import DeliveryState

Named = Mapping[str, Any]
"""Values by the names of the examples."""


def _sha256(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()


def _at(minutes: int, seconds: int = 0) -> datetime.datetime:
    return datetime.datetime(2026, 1, 15, 9, minutes, seconds, tzinfo=datetime.UTC)


_JOB_ID: Final = "67214642a45c4f90b78501d2e47a4967"
_RESUMABLE_ID: Final = "5a1f0c9b3e7d4826a0b8d2c64e91f357"
_MODEL: Final = _sha256("model")
_SAMPLES: Final = _sha256("samples")
_CHECKPOINT: Final = _sha256("checkpoint")

# Errors. The detail is what the service says; codes that no answer documents need no example.
_CAUSES: Final = (
    Cause(
        code=ServiceErrorCode.REQUEST_INVALID,
        detail="Input should be greater than or equal to 1.",
        field="limit",
    ),
    Cause(code=ServiceErrorCode.REQUEST_TOO_LARGE, detail="The request is larger than 4294967296 bytes."),
    Cause(
        code=ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED,
        detail="Send the file as application/octet-stream or multipart/form-data, not text/plain.",
    ),
    Cause(
        code=ServiceErrorCode.PRECONDITION_FAILED,
        detail=f"The file's ETag is \"{_MODEL}\", and results never change: If-Match names another file's.",
        field="If-Match",
    ),
    Cause(code=ServiceErrorCode.RANGE_INVALID, detail="The file has no such range.", field="Range"),
    Cause(
        code=ServiceErrorCode.IDEMPOTENCY_KEY_REUSED,
        detail="The Idempotency-Key was used for another request; take a new key for each request.",
        field="Idempotency-Key",
    ),
    Cause(
        code=ServiceErrorCode.UNAUTHORIZED,
        detail="Send your API key as `Authorization: Bearer KEY`.",
        field="Authorization",
    ),
    Cause(
        code=ServiceErrorCode.KEY_INVALID,
        detail="This is no API key of this service.",
        field="Authorization",
    ),
    Cause(
        code=ServiceErrorCode.KEY_EXPIRED,
        detail="The API key has expired; ask for another one.",
        field="Authorization",
    ),
    Cause(
        code=ServiceErrorCode.KEY_REVOKED,
        detail="The API key was revoked; ask for another one.",
        field="Authorization",
    ),
    Cause(
        code=ServiceErrorCode.RATE_LIMITED,
        detail="More than 600 requests a minute; go on after 1 seconds.",
    ),
    Cause(
        code=ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
        detail="The upload has 26454 bytes; 1048000 of your 1048576 are used.",
    ),
    Cause(
        code=ServiceErrorCode.JOB_QUOTA_EXCEEDED,
        detail="20 of your jobs are queued or running, as many as you may have; wait for one to end.",
    ),
    Cause(
        code=ServiceErrorCode.HOST_UNKNOWN,
        detail="The service does not answer under this name; use its IP address or localhost, or add the "
        "name to ONNX_QAT_ALLOWED_HOSTS.",
        field="Host",
    ),
    Cause(
        code=ServiceErrorCode.CROSS_ORIGIN,
        detail="The request comes from a page of another origin, which may not use the service.",
        field="Origin",
    ),
    Cause(code=ServiceErrorCode.UPLOAD_ABORTED, detail="The client closed the connection."),
    Cause(
        code=ServiceErrorCode.CONTENT_ENCODING_UNSUPPORTED,
        detail="Send the body as it is, without Content-Encoding.",
        field="Content-Encoding",
    ),
    Cause(code=ServiceErrorCode.UPLOAD_TIMEOUT, detail="Fewer than 65536 bytes arrived in 60 seconds."),
    Cause(
        code=ServiceErrorCode.UPLOADS_BUSY,
        detail="The service receives 256 uploads already, as many as it may; try again.",
    ),
    Cause(
        code=ServiceErrorCode.DIGEST_MISMATCH,
        detail=f"The SHA-256 of what arrived is {_SAMPLES}, not {_MODEL}; nothing was stored. Send it again.",
        file="model.onnx",
    ),
    Cause(
        code=ServiceErrorCode.CONTENT_NOT_FOUND,
        detail=f"None of your uploads has this content; upload it. Its SHA-256: {_MODEL}.",
        field="files.0.sha256",
    ),
    Cause(
        code=ServiceErrorCode.UPLOAD_NOT_FOUND,
        detail="There is no resumable upload with this id.",
        field="files.0.upload",
    ),
    Cause(code=ServiceErrorCode.UPLOAD_EXPIRED, detail="The upload has expired; begin again."),
    Cause(
        code=ServiceErrorCode.UPLOAD_UNFINISHED,
        detail="The resumable upload is not complete.",
        field="files.0.upload",
    ),
    Cause(
        code=ServiceErrorCode.UPLOAD_LOCKED,
        detail="Another request for this upload is not finished; try again.",
    ),
    Cause(
        code=ServiceErrorCode.UPLOAD_OFFSET_MISMATCH,
        detail="1048576 bytes have arrived; go on from there.",
        field="Upload-Offset",
    ),
    Cause(
        code=ServiceErrorCode.CHECKSUM_MISMATCH,
        detail="The body is not what Upload-Checksum says; it was dropped. Send it again.",
        field="Upload-Checksum",
    ),
    Cause(
        code=ServiceErrorCode.TUS_VERSION_UNSUPPORTED,
        detail="Tus-Resumable must be 1.0.0.",
        field="Tus-Resumable",
    ),
    Cause(code=ServiceErrorCode.UPLOAD_EMPTY, detail="The file is empty.", file="model.onnx"),
    Cause(
        code=ServiceErrorCode.FILE_NAME_INVALID,
        detail="An external-data file needs a plain file name of its own.",
        field="external_data",
        file="model.onnx",
    ),
    Cause(
        code=ErrorCode.EXTERNAL_DATA_OUTSIDE,
        detail="An external-data file must have a name without a path; it lies beside the model.",
        field="external_data",
        file="../weights.bin",
    ),
    Cause(code=ErrorCode.MODEL_NOT_FOUND, detail="There is no model with this id."),
    Cause(code=ErrorCode.DATA_NOT_FOUND, detail="There is no data set with this id."),
    Cause(code=ServiceErrorCode.CHECKPOINT_NOT_FOUND, detail="There is no checkpoint with this id."),
    Cause(
        code=ErrorCode.RECIPE_INVALID,
        detail="The recipe is not valid: Input should be greater than or equal to 2.",
        field="weight_bits",
    ),
    Cause(
        code=ErrorCode.RECIPE_UNSUPPORTED,
        detail="target = 'tensorrt' is not available in this version; use one of 'onnxruntime', "
        "'tf_contrib'.",
        field="target",
    ),
    Cause(code=ServiceErrorCode.JOB_NOT_FOUND, detail="There is no job with this id."),
    Cause(code=ServiceErrorCode.JOB_FINISHED, detail="The job has already succeeded."),
    Cause(code=ServiceErrorCode.JOB_NOT_FINISHED, detail="The job is running; cancel it first."),
    Cause(
        code=ServiceErrorCode.JOB_NOT_RETRYABLE,
        detail="The job is succeeded; only a failed or a cancelled job can be retried.",
    ),
    Cause(
        code=ServiceErrorCode.JOB_IN_USE,
        detail="A job that is not finished builds on this one; wait for it, or cancel it first.",
    ),
    Cause(
        code=ServiceErrorCode.UPLOAD_IN_USE,
        detail="A job that is not finished reads this upload; wait for it, or cancel it first.",
    ),
    Cause(
        code=ServiceErrorCode.WEBHOOK_URL_REFUSED,
        detail="The URL's host is not a public address.",
        field="webhook.url",
    ),
    Cause(
        code=ServiceErrorCode.WEBHOOK_SECRET_MISSING,
        detail="There is no secret to sign with: make one with POST /v1/webhook-secret, or give "
        "webhook.secret.",
        field="webhook.secret",
    ),
    Cause(
        code=ServiceErrorCode.WEBHOOK_LIMIT_REACHED,
        detail="The job has 16 webhooks already; it takes no more.",
        field="webhook",
    ),
    Cause(code=ServiceErrorCode.DELIVERY_NOT_FOUND, detail="The job has no delivery with this id."),
    Cause(
        code=ServiceErrorCode.JOB_NOT_SUCCEEDED,
        detail="The job is running; only a succeeded job has files.",
    ),
    Cause(
        code=ServiceErrorCode.FILE_NOT_FOUND,
        detail="The job made no such file; it made finalize.json, model.int8.onnx.",
        file="bundle.zip",
    ),
    Cause(
        code=ServiceErrorCode.EVENT_STREAMS_EXCEEDED,
        detail="You follow 100 jobs already, as many as you may; leave one, or ask for GET /v1/jobs/{id} now "
        "and then.",
    ),
    Cause(code=ServiceErrorCode.NOT_READY, detail="The database does not answer."),
    Cause(
        code=ServiceErrorCode.DATABASE_UNAVAILABLE,
        detail="The database did not answer; nothing was changed or the change is complete. Try again.",
    ),
    Cause(
        code=ServiceErrorCode.STORE_UNAVAILABLE,
        detail="The store of files did not answer; nothing was changed. Try again.",
    ),
    Cause(code=ServiceErrorCode.STORAGE_FULL, detail="The service is out of disk space."),
    Cause(code=ServiceErrorCode.INTERNAL_ERROR, detail="The service failed; its log says why."),
)
CAUSES: Final[Mapping[AnyErrorCode, Cause]] = {cause.code: cause for cause in _CAUSES}


def cause_example(code: AnyErrorCode) -> Cause:
    """What an answer with this code may say."""
    return CAUSES.get(code) or Cause(code=code, detail=f"{code.replace('_', ' ').capitalize()}.")


# What is answered.


def _upload(kind: UploadKind, identifier: str, size: int) -> Upload:
    file = StoredFile(name=FILE_NAMES[kind], bytes=size, sha256=identifier)
    return Upload(id=identifier, kind=kind, bytes=size, files=[file], created_at=_at(0))


_UPLOADS: Final = {
    "/v1/models": _upload(UploadKind.MODEL, _MODEL, 26454),
    "/v1/datasets": _upload(UploadKind.DATASET, _SAMPLES, 200964),
    "/v1/checkpoints": _upload(UploadKind.CHECKPOINT, _CHECKPOINT, 27315),
}

_PREPARE: Final = PrepareRequest(
    kind=JobKind.PREPARE, model=_MODEL, recipe=Recipe(weight_bits=4), calibration=_SAMPLES
)
_FINALIZE: Final = FinalizeRequest(
    kind=JobKind.FINALIZE, prepare_job=_JOB_ID, checkpoint=_CHECKPOINT, verify=_SAMPLES
)
_BUNDLE_FILES: Final = ("checkpoint", "eval_model.onnx", "manifest.json", "optimizer_model.onnx")


@functools.cache
def _jobs() -> Mapping[str, Job]:
    """A job in each state, by the state."""
    return {job.state.value: job for job in _each_state()}


def _each_state() -> Iterator[Job]:
    queued = Job(
        id=_JOB_ID,
        kind=JobKind.PREPARE,
        state=JobState.QUEUED,
        progress=Progress(stage=None, fraction=0.0),
        failure=None,
        request=_PREPARE,
        files=[],
        bundle=None,
        revision=0,
        attempt=0,
        retry_of=None,
        created_at=_at(1),
        started_at=None,
        finished_at=None,
        expires_at=None,
    )
    yield queued
    running = queued.model_copy(
        update={
            "state": JobState.RUNNING,
            "progress": Progress(stage="calibrate", fraction=0.25),
            "revision": 3,
            "attempt": 1,
            "started_at": _at(1, 2),
        }
    )
    yield running
    ended = {"revision": 7, "finished_at": _at(1, 9)}
    yield running.model_copy(
        update={
            **ended,
            "state": JobState.SUCCEEDED,
            "progress": Progress(stage="write", fraction=1.0),
            "files": [StoredFile(name=name, bytes=27315, sha256=_sha256(name)) for name in _BUNDLE_FILES],
            "bundle": StoredFile(name="bundle.zip", bytes=140301, sha256=_sha256("bundle")),
        }
    )
    yield running.model_copy(
        update={
            **ended,
            "state": JobState.FAILED,
            "failure": Cause(
                code=ErrorCode.MODEL_DOMAIN_UNKNOWN,
                detail="Node 'detect' is of the unknown operator set 'com.example'.",
                node="detect",
            ),
        }
    )
    yield running.model_copy(update={**ended, "state": JobState.CANCELLED})


_JOBS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "POST /v1/prepare": ("queued",),
    "POST /v1/jobs": ("queued",),
    "POST /v1/jobs/{job_id}/cancel": ("cancelled",),
    "POST /v1/jobs/{job_id}/retry": ("queued",),
}


def _summary(state: str) -> JobSummary:
    inputs = PrepareInputs(kind=JobKind.PREPARE, model=_MODEL, calibration=_SAMPLES)
    return JobSummary(**{**dict(_jobs()[state]), "request": inputs})


def _job_examples(operation: str) -> Named:
    return {state: _jobs()[state] for state in _JOBS_OF.get(operation, _jobs())}


def _upload_examples(operation: str) -> Named:
    path = operation.partition(" ")[2].removesuffix("/{upload_id}")
    return {"upload": _UPLOADS[path]}


_DELIVERY_ID: Final = "5f8d2c3b1a094e7d8c6b5a4f3e2d1c0b"
_URL: Final = "https://ci.example.com/hooks/quantized"
# No secret of anybody: the bytes from 1 to 32.
_SECRET: Final = "whsec_AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="
_DELIVERED: Final = Delivery(
    id=_DELIVERY_ID,
    event=WebhookEvent.SUCCEEDED,
    url=_URL,
    state=DeliveryState.DELIVERED,
    attempts=1,
    next_attempt_at=None,
    last_status=204,
    last_error=None,
    created_at=_at(1, 9),
    delivered_at=_at(1, 10),
)
_TO_BE_SENT_AGAIN: Final = Delivery(
    id=_DELIVERY_ID,
    event=WebhookEvent.SUCCEEDED,
    url=_URL,
    state=DeliveryState.PENDING,
    attempts=2,
    next_attempt_at=_at(1, 45),
    last_status=503,
    last_error="The receiver answered 503.",
    created_at=_at(1, 9),
    delivered_at=None,
)

# By the schema's name, for an operation.
_ANSWERS: Final[Mapping[str, Callable[[str], Named]]] = {
    "Upload": _upload_examples,
    "Job": _job_examples,
    "JobPage": lambda operation: {
        "page": JobPage(items=[_summary("running"), _summary("failed")], next=41),
        "last page": JobPage(items=[_summary("succeeded")], next=None),
    },
    "TenantStatus": lambda operation: {
        "a tenant with quotas": TenantStatus(
            id="team-a",
            name="Team A",
            key="1a35985ed2d3408d",
            stored_bytes=Usage(used=1048000, limit=1048576),
            unfinished_jobs=Usage(used=2, limit=20),
            requests_per_minute=600,
        ),
        "open mode": TenantStatus(
            id="default",
            name="default",
            key=None,
            stored_bytes=Usage(used=1048000, limit=None),
            unfinished_jobs=Usage(used=0, limit=None),
            requests_per_minute=None,
        ),
    },
    "Delivery": lambda operation: {"to be sent": _TO_BE_SENT_AGAIN},
    "DeliveryList": lambda operation: {"deliveries": DeliveryList(items=[_DELIVERED, _TO_BE_SENT_AGAIN])},
    "WebhookSecret": lambda operation: {
        "replaced": WebhookSecret(created_at=_at(0), previous_until=_at(0) + datetime.timedelta(days=1))
    },
    "NewWebhookSecret": lambda operation: {
        "first": NewWebhookSecret(created_at=_at(0), previous_until=None, secret=_SECRET)
    },
    "Health": lambda operation: {"ok": {"status": "ok"}},
    "Ready": lambda operation: {
        "ready": {
            "status": "ok",
            "isolation": {"writes": True, "reads": True, "network": True, "processes": True},
            "workers": 1,
            "busy_workers": 1,
            "warnings": [],
        },
        "no jobs run here": {
            "status": "ok",
            "isolation": None,
            "workers": 6,
            "busy_workers": 4,
            "warnings": [],
        },
        "no jobs run anywhere": {
            "status": "ok",
            "isolation": None,
            "workers": 0,
            "busy_workers": 0,
            "warnings": ["No worker is running: jobs are accepted and wait for one."],
        },
    },
}
_WEIGHTS: Final = {"name": "weights.bin", "sha256": _sha256("weights")}
_JSON_REQUESTS: Final[Mapping[str, Named]] = {
    "POST /v1/models": {"files": {"files": [{"name": "model.onnx", "upload": _RESUMABLE_ID}, _WEIGHTS]}},
    "POST /v1/datasets": {"files": {"files": [{"name": "data.npz", "upload": _RESUMABLE_ID}]}},
    "POST /v1/checkpoints": {"files": {"files": [{"name": "checkpoint", "upload": _RESUMABLE_ID}]}},
    "POST /v1/jobs": {
        "prepare": {
            "kind": "prepare",
            "model": _MODEL,
            "recipe": {"weight_bits": 4},
            "calibration": _SAMPLES,
        },
        "finalize": _FINALIZE,
        "with a webhook": {
            "kind": "prepare",
            "model": _MODEL,
            "webhook": {"url": _URL, "events": ["job.succeeded", "job.failed"]},
        },
    },
}


def _events() -> str:
    return "".join(
        f"id: {job.revision}\nevent: job\ndata: {job.model_dump_json()}\n\n"
        for job in (_summary("running"), _summary("succeeded"))
    )


_PARAMETERS: Final[Named] = {
    "upload_id": _MODEL,
    "job_id": _JOB_ID,
    "delivery_id": _DELIVERY_ID,
    "resumable_id": _RESUMABLE_ID,
    "Tus-Resumable": "1.0.0",
    "Upload-Length": 26454,
    "Upload-Offset": 0,
    "Upload-Metadata": "kind bW9kZWxz,filename bW9kZWwub25ueA==",
    "name": "manifest.json",
    "state": "running",
    "limit": 20,
    "cursor": 41,
    "redirect": True,
    "last-event-id": 3,
    "Idempotency-Key": "6f1c1d0e-nightly-2026-01-15",
}


def add_examples(document: dict[str, Any]) -> None:
    """Add examples to the operations of an OpenAPI document, where they have none.

    A file has none: its bytes cannot be shown.
    """
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _add_to_operation(f"{method.upper()} {path}", operation)


def _add_to_operation(name: str, operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in _PARAMETERS:
            parameter.setdefault("example", _PARAMETERS[parameter["name"]])
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        if media_type == "multipart/form-data":
            _add(content, {"form": _form(content["schema"])})
        elif media_type == "application/json":
            _add(content, _JSON_REQUESTS.get(name, {}))
    for answer in operation["responses"].values():
        for media_type, content in answer.get("content", {}).items():
            if media_type == "text/event-stream":
                _add(content, {"events": _events()})
            elif media_type == "application/json":
                schema = content["schema"].get("$ref", "").rpartition("/")[2]
                if schema in _ANSWERS:
                    _add(content, _ANSWERS[schema](name))


def _add(content: dict[str, Any], examples: Named) -> None:
    if examples:
        content.setdefault("examples", {name: {"value": _json(value)} for name, value in examples.items()})


def _json(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


_FORM_FIELDS: Final[Named] = {"recipe": {"weight_bits": 4}, "webhook": {"url": _URL}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    """A form with each field: files as words, for their bytes cannot be shown, the others by their names."""

    def field(name: str, schema: dict[str, Any]) -> Any:
        if schema.get("type") == "array":
            return [field(name, schema["items"])]
        return f"(bytes of {name})" if schema.get("format") == "binary" else _FORM_FIELDS[name]

    return {name: field(name, part) for name, part in schema["properties"].items()}
