"""Uploads over HTTP."""

from __future__ import annotations

from typing import Any, Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response, status

from rewriter import ErrorCode
from service.dependencies import InServices
from service.errors import ServiceErrorCode
from service.problems import problem_responses
from service.uploads.models import UploadKind
from service.uploads.receiving import receive_upload
from service.uploads.schemas import Upload, UploadId
from service.uploads.service import NOT_FOUND_CODES

UPLOAD_ERRORS: Final = (
    ServiceErrorCode.REQUEST_INVALID,
    ServiceErrorCode.REQUEST_TOO_LARGE,
    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED,
    ServiceErrorCode.UPLOAD_EMPTY,
    ServiceErrorCode.UPLOAD_ABORTED,
    ServiceErrorCode.STORAGE_FULL,
)
MODEL_UPLOAD_ERRORS: Final = (
    *UPLOAD_ERRORS,
    ServiceErrorCode.FILE_NAME_INVALID,
    ErrorCode.EXTERNAL_DATA_OUTSIDE,
)
BINARY: Final = {"type": "string", "format": "binary"}
EXTERNAL_DATA: Final = {
    "type": "array",
    "items": BINARY,
    "description": "files of the model's external data; the file names are those the model refers to",
}

router = APIRouter(tags=["uploads"])


def _body(field: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """OpenAPI for a body that is the file itself or a form with it."""
    form = {"type": "object", "properties": {field: BINARY, **(more or {})}, "required": [field]}
    content = {
        "application/octet-stream": {"schema": BINARY},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}


_CREATED: Final[dict[int | str, dict[str, Any]]] = {
    201: {"description": "Stored", "model": Upload},
    200: {"description": "The same content was there already", "model": Upload},
}


async def _receive(kind: UploadKind, request: Request, response: Response, services: InServices) -> Upload:
    with services.data.staged() as directory:
        received = await receive_upload(request, kind, directory, services.settings)
        upload, is_new = await anyio.to_thread.run_sync(services.uploads.store, received, kind)
    response.status_code = status.HTTP_201_CREATED if is_new else status.HTTP_200_OK
    response.headers["Location"] = f"/v1/{kind.value}/{upload.id}"
    return upload


@router.post(
    "/v1/models",
    status_code=status.HTTP_201_CREATED,
    responses={**_CREATED, **problem_responses(*MODEL_UPLOAD_ERRORS)},
    openapi_extra=_body("model", {"external_data": EXTERNAL_DATA}),
)
async def upload_model(request: Request, response: Response, services: InServices) -> Upload:
    """Store an ONNX model: the file itself, or a form with it and its external-data files."""
    return await _receive(UploadKind.MODEL, request, response, services)


@router.post(
    "/v1/datasets",
    status_code=status.HTTP_201_CREATED,
    responses={**_CREATED, **problem_responses(*UPLOAD_ERRORS)},
    openapi_extra=_body("dataset"),
)
async def upload_dataset(request: Request, response: Response, services: InServices) -> Upload:
    """Store samples for calibration or verification: an npz file, one array for each graph input."""
    return await _receive(UploadKind.DATASET, request, response, services)


@router.post(
    "/v1/checkpoints",
    status_code=status.HTTP_201_CREATED,
    responses={**_CREATED, **problem_responses(*UPLOAD_ERRORS)},
    openapi_extra=_body("checkpoint"),
)
async def upload_checkpoint(request: Request, response: Response, services: InServices) -> Upload:
    """Store a checkpoint that onnxruntime's training API saved after training a bundle."""
    return await _receive(UploadKind.CHECKPOINT, request, response, services)


def _found_or(kind: UploadKind) -> dict[int | str, dict[str, Any]]:
    return problem_responses(NOT_FOUND_CODES[kind], ServiceErrorCode.REQUEST_INVALID)


@router.get("/v1/models/{upload_id}", responses=_found_or(UploadKind.MODEL))
def get_model(upload_id: UploadId, services: InServices) -> Upload:
    """Whether a model is there: its id is known beforehand for a single file."""
    return services.uploads.get(UploadKind.MODEL, upload_id)


@router.get("/v1/datasets/{upload_id}", responses=_found_or(UploadKind.DATASET))
def get_dataset(upload_id: UploadId, services: InServices) -> Upload:
    """Whether a data set is there."""
    return services.uploads.get(UploadKind.DATASET, upload_id)


@router.get("/v1/checkpoints/{upload_id}", responses=_found_or(UploadKind.CHECKPOINT))
def get_checkpoint(upload_id: UploadId, services: InServices) -> Upload:
    """Whether a checkpoint is there."""
    return services.uploads.get(UploadKind.CHECKPOINT, upload_id)
