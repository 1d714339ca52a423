"""Jobs over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Final

import anyio.to_thread
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator

from rewriter import ErrorCode, Recipe
from service.dependencies import InServices, Tenant
from service.errors import ServiceError, ServiceErrorCode
from service.jobs.downloads import Download, MayRedirect
from service.jobs.schemas import Job, JobId, JobPage, PrepareRequest, SubmittedRequest, parse_recipe
from service.jobs.states import FINISHED, JobKind, JobState
from service.json_route import JsonRoute
from service.problems import problem_responses
from service.services import Services
from service.uploads.endpoints import MODEL_UPLOAD_ERRORS
from service.uploads.forms import BINARY, EXTERNAL_DATA, UPLOADED, form
from service.uploads.kinds import UploadKind
from service.uploads.receiving import PREPARE_FORM, Received, receive_form
from service.webhooks.schemas import Webhook, parse_webhook

_LARGEST_CURSOR: Final = 2**63 - 1
_BINARY_CONTENT: Final = {"application/octet-stream": {"schema": BINARY}}
_ZIP_CONTENT: Final = {"application/zip": {"schema": BINARY}}
_RECIPE_ERRORS: Final = (
    ErrorCode.RECIPE_INVALID,
    ErrorCode.RECIPE_UNSUPPORTED,
    ServiceErrorCode.IDEMPOTENCY_KEY_REUSED,
)
_JOB_ERRORS: Final = (ServiceErrorCode.JOB_NOT_FOUND, ServiceErrorCode.REQUEST_INVALID)
WEBHOOK_ERRORS: Final = (
    ServiceErrorCode.WEBHOOK_URL_REFUSED,
    ServiceErrorCode.WEBHOOK_SECRET_MISSING,
    ServiceErrorCode.WEBHOOK_LIMIT_REACHED,
)
_DOWNLOAD_ERRORS: Final = (
    *_JOB_ERRORS,
    ServiceErrorCode.FILE_NOT_FOUND,
    ServiceErrorCode.JOB_NOT_SUCCEEDED,
    ServiceErrorCode.PRECONDITION_FAILED,
    ServiceErrorCode.RANGE_INVALID,
    ServiceErrorCode.STORE_UNAVAILABLE,
)

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="a repeated request with the same key is answered with the first one's job",
    ),
]


def _require_one_key(request: Request) -> None:
    """FastAPI would take one of several."""
    if len(request.headers.getlist("Idempotency-Key")) > 1:
        raise ServiceError(
            ServiceErrorCode.REQUEST_INVALID, "There is more than one.", field="Idempotency-Key"
        )


_KEYED: Final = [Depends(_require_one_key)]

router = APIRouter(tags=["jobs"], route_class=JsonRoute)


def _accepted(job: Job, response: Response) -> Job:
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.post(
    "/v1/jobs",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=_KEYED,
    responses=problem_responses(
        *_RECIPE_ERRORS,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.DATA_NOT_FOUND,
        ServiceErrorCode.CHECKPOINT_NOT_FOUND,
        ServiceErrorCode.JOB_NOT_FOUND,
        ServiceErrorCode.JOB_NOT_SUCCEEDED,
        *WEBHOOK_ERRORS,
        ServiceErrorCode.REQUEST_INVALID,
        ServiceErrorCode.REQUEST_TOO_LARGE,
        ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED,
        ServiceErrorCode.JOB_QUOTA_EXCEEDED,
        ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
        ServiceErrorCode.CONTENT_ENCODING_UNSUPPORTED,
        ServiceErrorCode.UPLOAD_ABORTED,
        ServiceErrorCode.UPLOAD_TIMEOUT,
    ),
)
def submit_job(
    request: Annotated[SubmittedRequest, Body()],
    response: Response,
    services: InServices,
    tenant: Tenant,
    key: IdempotencyKey = None,
) -> Job:
    """Queue a job. The same work is done once: submitting it again returns the job that exists."""
    return _accepted(services.jobs.submit(tenant, request, key, request.webhook), response)


@router.head("/v1/jobs", include_in_schema=False)
@router.get("/v1/jobs", responses=problem_responses(ServiceErrorCode.REQUEST_INVALID))
def list_jobs(
    services: InServices,
    tenant: Tenant,
    state: JobState | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        int | None, Query(ge=1, le=_LARGEST_CURSOR, description="`next` of the last page")
    ] = None,
) -> JobPage:
    """Jobs, the newest first, without their recipes."""
    return services.jobs.page(tenant, state=state, cursor=cursor, limit=limit)


@router.head("/v1/jobs/{job_id}", include_in_schema=False)
@router.get("/v1/jobs/{job_id}", responses=problem_responses(*_JOB_ERRORS))
def get_job(job_id: JobId, services: InServices, tenant: Tenant) -> Job:
    """State, progress and outcome of a job."""
    return services.jobs.get(tenant, job_id)


def _none_if_empty(value: str | None) -> str | None:
    return value or None


LastEventId = Annotated[
    int | None, BeforeValidator(_none_if_empty), Header(description="revision seen last; empty: none")
]


async def _stream_admitted(services: InServices, tenant: Tenant) -> AsyncIterator[None]:
    """Until the stream has ended, however it does."""
    with services.events.admitted(tenant):
        yield


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    dependencies=[Depends(_stream_admitted)],
    responses={
        200: {
            "description": "Server-sent events named `job`, each a JobSummary, until the job has ended",
            "content": {"text/event-stream": {}},
        },
        204: {"description": "The job has ended, and Last-Event-ID is its last: do not connect again"},
        **problem_responses(*_JOB_ERRORS, ServiceErrorCode.EVENT_STREAMS_EXCEEDED),
    },
)
async def follow_job(
    job_id: JobId, services: InServices, tenant: Tenant, last_event_id: LastEventId = None
) -> Response:
    """Follow a job as server-sent events; the event id is the job's revision."""
    job = await anyio.to_thread.run_sync(services.jobs.summary, tenant, job_id)
    if job.state in FINISHED and job.revision == last_event_id:
        return Response(status_code=status.HTTP_204_NO_CONTENT)
    return StreamingResponse(
        services.events.stream(job, last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.post(
    "/v1/jobs/{job_id}/cancel", responses=problem_responses(*_JOB_ERRORS, ServiceErrorCode.JOB_FINISHED)
)
def cancel_job(job_id: JobId, services: InServices, tenant: Tenant) -> Job:
    """Cancel a job that has not finished; its process is killed."""
    return services.jobs.cancel(tenant, job_id)


@router.post(
    "/v1/jobs/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=_KEYED,
    responses=problem_responses(
        *_JOB_ERRORS,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.DATA_NOT_FOUND,
        ServiceErrorCode.CHECKPOINT_NOT_FOUND,
        ServiceErrorCode.JOB_NOT_RETRYABLE,
        *_RECIPE_ERRORS,
        ServiceErrorCode.WEBHOOK_LIMIT_REACHED,
        ServiceErrorCode.JOB_QUOTA_EXCEEDED,
        ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
    ),
)
def retry_job(
    job_id: JobId, response: Response, services: InServices, tenant: Tenant, key: IdempotencyKey = None
) -> Job:
    """Queue a failed or cancelled job again, as a new job. Its webhooks are told of the new one too."""
    return _accepted(services.jobs.retry(tenant, job_id, key), response)


@router.head("/v1/jobs/{job_id}/bundle", include_in_schema=False)
@router.get(
    "/v1/jobs/{job_id}/bundle",
    response_class=Download,
    responses={
        200: {"description": "The bundle as a zip", "content": _ZIP_CONTENT},
        206: {"description": "The range asked for", "content": _ZIP_CONTENT},
        304: {"description": "If-None-Match names the current ETag"},
        307: {"description": "The store has it, at the address in Location, for some minutes"},
        **problem_responses(*_DOWNLOAD_ERRORS),
    },
)
def download_bundle(
    job_id: JobId, services: InServices, tenant: Tenant, request: Request, redirect: MayRedirect = True
) -> Response:
    """The bundle that a prepare job made. Takes Range, If-Match and If-None-Match."""
    key, file = services.jobs.bundle(tenant, job_id)
    return Download.of(
        request,
        services.store,
        key,
        file,
        filename=f"bundle-{job_id}.zip",
        media_type="application/zip",
        redirect=redirect,
    )


@router.head("/v1/jobs/{job_id}/files/{name}", include_in_schema=False)
@router.get(
    "/v1/jobs/{job_id}/files/{name}",
    response_class=Download,
    responses={
        200: {"description": "The file", "content": _BINARY_CONTENT},
        206: {"description": "The range asked for", "content": _BINARY_CONTENT},
        304: {"description": "If-None-Match names the current ETag"},
        307: {"description": "The store has it, at the address in Location, for some minutes"},
        **problem_responses(*_DOWNLOAD_ERRORS),
    },
)
def download_file(
    job_id: JobId,
    name: str,
    services: InServices,
    tenant: Tenant,
    request: Request,
    redirect: MayRedirect = True,
) -> Response:
    """One file that a job made. Takes Range, If-Match and If-None-Match."""
    key, file = services.jobs.result_file(tenant, job_id, name)
    return Download.of(request, services.store, key, file, filename=name, redirect=redirect)


# The form is streamed to disk by the endpoint itself, so this is not a JsonRoute.
prepare_router = APIRouter(tags=["jobs"])


@prepare_router.post(
    "/v1/prepare",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=_KEYED,
    responses=problem_responses(
        *MODEL_UPLOAD_ERRORS, *_RECIPE_ERRORS, *WEBHOOK_ERRORS, ServiceErrorCode.JOB_QUOTA_EXCEEDED
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": form(
                        {
                            "model": UPLOADED,
                            "external_data": EXTERNAL_DATA,
                            "recipe": {"$ref": "#/components/schemas/Recipe"},
                            "calibration": {**UPLOADED, "description": "npz, one array for each graph input"},
                            "webhook": {"$ref": "#/components/schemas/Webhook"},
                        },
                        required="model",
                    ),
                    "encoding": {
                        "recipe": {"contentType": "application/json"},
                        "webhook": {"contentType": "application/json"},
                    },
                }
            },
        }
    },
)
async def prepare(
    request: Request, response: Response, services: InServices, tenant: Tenant, key: IdempotencyKey = None
) -> Job:
    """Upload a model, and what goes with it, and queue its preparation: all in one request."""
    with services.intake.admitted():
        async with services.intake.staged(services.data) as directory:
            received = await receive_form(request, PREPARE_FORM, directory, services.intake)
            received.require(UploadKind.MODEL, "model")
            recipe = parse_recipe(received.texts.get("recipe", b"{}"))
            webhook = parse_webhook(received.texts.get("webhook"))
            job = await services.intake.start(
                _store_and_submit, services, tenant, received, recipe, key, webhook
            )
    return _accepted(job, response)


def _store_and_submit(
    services: Services,
    tenant: str,
    received: Received,
    recipe: Recipe,
    key: str | None,
    webhook: Webhook | None,
) -> Job:
    ids = {kind: services.uploads.store(tenant, received, kind)[0].id for kind in received.files}
    request = PrepareRequest(
        kind=JobKind.PREPARE,
        model=ids[UploadKind.MODEL],
        recipe=recipe,
        calibration=ids.get(UploadKind.DATASET),
    )
    return services.jobs.submit(tenant, request, key, webhook)
