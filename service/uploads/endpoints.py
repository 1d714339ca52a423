"""Uploads over HTTP."""

from __future__ import annotations

import json
from typing import Any, Final

from fastapi import APIRouter, Request, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from rewriter import ErrorCode
from service.dependencies import InServices, Tenant
from service.errors import ServiceError, ServiceErrorCode
from service.problems import problem_responses
from service.services import Services
from service.uploads.assembling import Assembly, assemble, assembly_schema
from service.uploads.body import bounded_body, media_type_of
from service.uploads.forms import EXTERNAL_DATA, UPLOADED, form
from service.uploads.kinds import UploadKind
from service.uploads.receiving import receive_upload
from service.uploads.schemas import Upload, UploadId
from service.uploads.service import NOT_FOUND_CODES

UPLOAD_ERRORS: Final = (
    ServiceErrorCode.REQUEST_INVALID,
    ServiceErrorCode.REQUEST_TOO_LARGE,
    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED,
    ServiceErrorCode.CONTENT_ENCODING_UNSUPPORTED,
    ServiceErrorCode.UPLOAD_EMPTY,
    ServiceErrorCode.UPLOAD_ABORTED,
    ServiceErrorCode.UPLOAD_TIMEOUT,
    ServiceErrorCode.UPLOADS_BUSY,
    ServiceErrorCode.DIGEST_MISMATCH,
    ServiceErrorCode.STORAGE_FULL,
    ServiceErrorCode.STORE_UNAVAILABLE,
    ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
)
MODEL_UPLOAD_ERRORS: Final = (
    *UPLOAD_ERRORS,
    ServiceErrorCode.FILE_NAME_INVALID,
    ErrorCode.EXTERNAL_DATA_OUTSIDE,
)
# Of a request that names files which are there.
_ASSEMBLY_ERRORS: Final = (
    ServiceErrorCode.UPLOAD_NOT_FOUND,
    ServiceErrorCode.UPLOAD_EXPIRED,
    ServiceErrorCode.UPLOAD_UNFINISHED,
    ServiceErrorCode.CONTENT_NOT_FOUND,
)

router = APIRouter(tags=["uploads"])


def _body(kind: UploadKind, field: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """OpenAPI for a body that is the file itself, a form with it, or a list of files that are there."""
    content = {
        "application/octet-stream": {"schema": UPLOADED},
        "multipart/form-data": {"schema": form({field: UPLOADED, **(more or {})}, required=field)},
        "application/json": {"schema": assembly_schema(kind)},
    }
    return {"requestBody": {"required": True, "content": content}}


_CREATED: Final[dict[int | str, dict[str, Any]]] = {
    201: {"description": "Stored", "model": Upload},
    200: {"description": "The same content was there already", "model": Upload},
}


async def _receive(
    kind: UploadKind, request: Request, response: Response, services: Services, tenant: str
) -> Upload:
    start = services.intake.start
    with services.intake.admitted():
        async with services.intake.staged(services.data) as directory:
            if media_type_of(request) == "application/json":
                assembly = await _assembly(request, services)
                upload, is_new = await start(
                    assemble, services.uploads, services.resumable, tenant, kind, assembly, directory
                )
            else:
                received = await receive_upload(request, kind, directory, services.intake)
                upload, is_new = await start(services.uploads.store, tenant, received, kind)
    response.status_code = status.HTTP_201_CREATED if is_new else status.HTTP_200_OK
    response.headers["Location"] = f"/v1/{kind.value}/{upload.id}"
    return upload


async def _assembly(request: Request, services: Services) -> Assembly:
    settings = services.settings
    body = b"".join(
        [piece async for piece in bounded_body(request, settings.max_request_bytes, services.intake)]
    )
    try:
        assembly = Assembly.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_context=False)
        # With the body, by which the handler tells the fields from what Pydantic calls their forms.
        content = None if errors[0]["type"] == "json_invalid" else json.loads(body)
        raise RequestValidationError(
            [{**item, "loc": ("body", *item["loc"])} for item in errors], body=content
        ) from error
    if len(assembly.files) > settings.max_upload_files:
        raise ServiceError(
            ServiceErrorCode.REQUEST_TOO_LARGE,
            f"An upload may have {settings.max_upload_files} files.",
            field="files",
        )
    return assembly


@router.post(
    "/v1/models",
    status_code=status.HTTP_201_CREATED,
    responses={**_CREATED, **problem_responses(*MODEL_UPLOAD_ERRORS, *_ASSEMBLY_ERRORS)},
    openapi_extra=_body(UploadKind.MODEL, "model", {"external_data": EXTERNAL_DATA}),
)
async def upload_model(request: Request, response: Response, services: InServices, tenant: Tenant) -> Upload:
    """Store an ONNX model: the file itself, a form with it and its external-data files, or (JSON) a list of
    files that are there already: resumable uploads, and content of earlier uploads.
    """
    return await _receive(UploadKind.MODEL, request, response, services, tenant)


@router.post(
    "/v1/datasets",
    status_code=status.HTTP_201_CREATED,
    responses={**_CREATED, **problem_responses(*UPLOAD_ERRORS, *_ASSEMBLY_ERRORS)},
    openapi_extra=_body(UploadKind.DATASET, "dataset"),
)
async def upload_dataset(
    request: Request, response: Response, services: InServices, tenant: Tenant
) -> Upload:
    """Store samples for calibration or verification: an npz file, one array for each graph input."""
    return await _receive(UploadKind.DATASET, request, response, services, tenant)


@router.post(
    "/v1/checkpoints",
    status_code=status.HTTP_201_CREATED,
    responses={**_CREATED, **problem_responses(*UPLOAD_ERRORS, *_ASSEMBLY_ERRORS)},
    openapi_extra=_body(UploadKind.CHECKPOINT, "checkpoint"),
)
async def upload_checkpoint(
    request: Request, response: Response, services: InServices, tenant: Tenant
) -> Upload:
    """Store a checkpoint that onnxruntime's training API saved after training a bundle."""
    return await _receive(UploadKind.CHECKPOINT, request, response, services, tenant)


def _found_or(kind: UploadKind) -> dict[int | str, dict[str, Any]]:
    return problem_responses(NOT_FOUND_CODES[kind], ServiceErrorCode.REQUEST_INVALID)


@router.head("/v1/models/{upload_id}", include_in_schema=False)
@router.get("/v1/models/{upload_id}", responses=_found_or(UploadKind.MODEL))
def get_model(upload_id: UploadId, services: InServices, tenant: Tenant) -> Upload:
    """Whether a model is there: its id is known beforehand for a single file."""
    return services.uploads.get(tenant, UploadKind.MODEL, upload_id)


@router.head("/v1/datasets/{upload_id}", include_in_schema=False)
@router.get("/v1/datasets/{upload_id}", responses=_found_or(UploadKind.DATASET))
def get_dataset(upload_id: UploadId, services: InServices, tenant: Tenant) -> Upload:
    """Whether a data set is there."""
    return services.uploads.get(tenant, UploadKind.DATASET, upload_id)


@router.head("/v1/checkpoints/{upload_id}", include_in_schema=False)
@router.get("/v1/checkpoints/{upload_id}", responses=_found_or(UploadKind.CHECKPOINT))
def get_checkpoint(upload_id: UploadId, services: InServices, tenant: Tenant) -> Upload:
    """Whether a checkpoint is there."""
    return services.uploads.get(tenant, UploadKind.CHECKPOINT, upload_id)
