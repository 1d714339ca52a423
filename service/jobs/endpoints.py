"""Jobs over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final

import anyio.to_thread
from fastapi import APIRouter, Body, Header, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.types import Message

from rewriter import ErrorCode, Recipe
from service.dependencies import InServices, Services
from service.errors import ServiceError, ServiceErrorCode
from service.jobs.downloads import Download
from service.jobs.events import job_events
from service.jobs.models import JobKind, JobState
from service.jobs.schemas import Job, JobId, JobPage, PrepareRequest, SubmittedRequest, parse_recipe
from service.problems import problem_responses
from service.uploads.endpoints import BINARY, EXTERNAL_DATA, MODEL_UPLOAD_ERRORS
from service.uploads.models import UploadKind
from service.uploads.receiving import PREPARE_FORM, Received, bounded_body, media_type_of, receive_form

_LARGEST_CURSOR: Final = 2**63 - 1
_BINARY_CONTENT: Final = {"application/octet-stream": {"schema": BINARY}}
_ZIP_CONTENT: Final = {"application/zip": {"schema": BINARY}}
_RECIPE_ERRORS: Final = (
    ErrorCode.RECIPE_INVALID,
    ErrorCode.RECIPE_UNSUPPORTED,
    ServiceErrorCode.IDEMPOTENCY_KEY_REUSED,
)
_JOB_ERRORS: Final = (ServiceErrorCode.JOB_NOT_FOUND, ServiceErrorCode.REQUEST_INVALID)
_DOWNLOAD_ERRORS: Final = (
    *_JOB_ERRORS,
    ServiceErrorCode.FILE_NOT_FOUND,
    ServiceErrorCode.JOB_NOT_SUCCEEDED,
    ServiceErrorCode.RANGE_INVALID,
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


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is JSON of bounded size: FastAPI alone reads a body of any size."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            if media_type_of(request) != "application/json":
                raise ServiceError(
                    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED, "Send the request as application/json."
                )
            services: Services = request.app.state.services
            chunks = [chunk async for chunk in bounded_body(request, services.settings.max_request_bytes)]

            async def replay() -> Message:
                return {"type": "http.request", "body": b"".join(chunks), "more_body": False}

            return await handle(Request(request.scope, replay))

        return handle_json


router = APIRouter(tags=["jobs"], route_class=JsonRoute)


def _accepted(job: Job, response: Response) -> Job:
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.post(
    "/v1/jobs",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problem_responses(
        *_RECIPE_ERRORS,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.DATA_NOT_FOUND,
        ServiceErrorCode.CHECKPOINT_NOT_FOUND,
        ServiceErrorCode.JOB_NOT_FOUND,
        ServiceErrorCode.JOB_NOT_SUCCEEDED,
        ServiceErrorCode.JOB_KIND_UNAVAILABLE,
        ServiceErrorCode.REQUEST_INVALID,
        ServiceErrorCode.REQUEST_TOO_LARGE,
        ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED,
    ),
)
def submit_job(
    request: Annotated[SubmittedRequest, Body()],
    response: Response,
    services: InServices,
    key: IdempotencyKey = None,
) -> Job:
    """Queue a job. The same work is done once: submitting it again returns the job that exists."""
    return _accepted(services.jobs.submit(request, key), response)


@router.get("/v1/jobs", responses=problem_responses(ServiceErrorCode.REQUEST_INVALID))
def list_jobs(
    services: InServices,
    state: JobState | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        int | None, Query(ge=1, le=_LARGEST_CURSOR, description="`next` of the last page")
    ] = None,
) -> JobPage:
    """Jobs, the newest first."""
    return services.jobs.page(state=state, cursor=cursor, limit=limit)


@router.get("/v1/jobs/{job_id}", responses=problem_responses(*_JOB_ERRORS))
def get_job(job_id: JobId, services: InServices) -> Job:
    """State, progress and outcome of a job."""
    return services.jobs.get(job_id)


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events named `job`, each a Job, until the job has ended",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problem_responses(*_JOB_ERRORS),
    },
)
async def follow_job(
    job_id: JobId,
    services: InServices,
    last_event_id: Annotated[int | None, Header(description="revision seen last")] = None,
) -> StreamingResponse:
    """Follow a job as server-sent events; the event id is the job's revision."""
    await anyio.to_thread.run_sync(services.jobs.get, job_id)
    return StreamingResponse(
        job_events(services.jobs, job_id, last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.post(
    "/v1/jobs/{job_id}/cancel", responses=problem_responses(*_JOB_ERRORS, ServiceErrorCode.JOB_FINISHED)
)
def cancel_job(job_id: JobId, services: InServices) -> Job:
    """Cancel a job that has not finished; its process is killed."""
    return services.jobs.cancel(job_id)


@router.get(
    "/v1/jobs/{job_id}/bundle",
    response_class=Download,
    responses={
        200: {"description": "The bundle as a zip", "content": _ZIP_CONTENT},
        206: {"description": "The range asked for", "content": _ZIP_CONTENT},
        304: {"description": "If-None-Match names the current ETag"},
        **problem_responses(*_DOWNLOAD_ERRORS),
    },
)
def download_bundle(job_id: JobId, services: InServices, request: Request) -> Response:
    """The bundle that a prepare job made. Takes Range and If-None-Match."""
    path, file = services.jobs.bundle(job_id)
    return Download.of(request, path, file, filename=f"bundle-{job_id}.zip", media_type="application/zip")


@router.get(
    "/v1/jobs/{job_id}/files/{name}",
    response_class=Download,
    responses={
        200: {"description": "The file", "content": _BINARY_CONTENT},
        206: {"description": "The range asked for", "content": _BINARY_CONTENT},
        304: {"description": "If-None-Match names the current ETag"},
        **problem_responses(*_DOWNLOAD_ERRORS),
    },
)
def download_file(job_id: JobId, name: str, services: InServices, request: Request) -> Response:
    """One file that a job made. Takes Range and If-None-Match."""
    path, file = services.jobs.result_file(job_id, name)
    return Download.of(request, path, file, filename=name)


# The form is streamed to disk by the endpoint itself, so this is not a JsonRoute.
prepare_router = APIRouter(tags=["jobs"])


@prepare_router.post(
    "/v1/prepare",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problem_responses(*MODEL_UPLOAD_ERRORS, *_RECIPE_ERRORS),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["model"],
                        "properties": {
                            "model": BINARY,
                            "external_data": EXTERNAL_DATA,
                            "recipe": {"$ref": "#/components/schemas/Recipe"},
                            "calibration": {**BINARY, "description": "npz, one array for each graph input"},
                        },
                    },
                    "encoding": {"recipe": {"contentType": "application/json"}},
                }
            },
        }
    },
)
async def prepare(
    request: Request, response: Response, services: InServices, key: IdempotencyKey = None
) -> Job:
    """Upload a model, and what goes with it, and queue its preparation: all in one request."""
    with services.data.staged() as directory:
        received = await receive_form(request, PREPARE_FORM, directory, services.settings)
        received.require(UploadKind.MODEL, "model")
        recipe = parse_recipe(received.texts.get("recipe", b"{}"))
        job = await anyio.to_thread.run_sync(_store_and_submit, services, received, recipe, key)
    return _accepted(job, response)


def _store_and_submit(services: Services, received: Received, recipe: Recipe, key: str | None) -> Job:
    ids = {kind: services.uploads.store(received, kind)[0].id for kind in received.files}
    request = PrepareRequest(
        kind=JobKind.PREPARE,
        model=ids[UploadKind.MODEL],
        recipe=recipe,
        calibration=ids.get(UploadKind.DATASET),
    )
    return services.jobs.submit(request, key)
