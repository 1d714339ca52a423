"""Removing jobs and uploads over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, status

from service.dependencies import InServices, Tenant
from service.errors import ServiceErrorCode
from service.jobs.schemas import JobId
from service.problems import problem_responses
from service.uploads.kinds import UploadKind
from service.uploads.schemas import UploadId
from service.uploads.service import NOT_FOUND_CODES

router = APIRouter()


@router.delete(
    "/v1/jobs/{job_id}",
    tags=["jobs"],
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problem_responses(
        ServiceErrorCode.JOB_NOT_FOUND,
        ServiceErrorCode.JOB_NOT_FINISHED,
        ServiceErrorCode.JOB_IN_USE,
        ServiceErrorCode.REQUEST_INVALID,
    ),
)
def delete_job(job_id: JobId, services: InServices, tenant: Tenant) -> None:
    """Remove a finished job and its files. Downloads that have begun go on to their end."""
    services.removal.delete_job(tenant, job_id)


def _gone_or(kind: UploadKind) -> dict[int | str, dict[str, Any]]:
    return problem_responses(
        NOT_FOUND_CODES[kind], ServiceErrorCode.UPLOAD_IN_USE, ServiceErrorCode.REQUEST_INVALID
    )


@router.delete(
    "/v1/models/{upload_id}",
    tags=["uploads"],
    status_code=status.HTTP_204_NO_CONTENT,
    responses=_gone_or(UploadKind.MODEL),
)
def delete_model(upload_id: UploadId, services: InServices, tenant: Tenant) -> None:
    """Remove a model, unless a job that is not finished reads it."""
    services.removal.delete_upload(tenant, UploadKind.MODEL, upload_id)


@router.delete(
    "/v1/datasets/{upload_id}",
    tags=["uploads"],
    status_code=status.HTTP_204_NO_CONTENT,
    responses=_gone_or(UploadKind.DATASET),
)
def delete_dataset(upload_id: UploadId, services: InServices, tenant: Tenant) -> None:
    """Remove a data set, unless a job that is not finished reads it."""
    services.removal.delete_upload(tenant, UploadKind.DATASET, upload_id)


@router.delete(
    "/v1/checkpoints/{upload_id}",
    tags=["uploads"],
    status_code=status.HTTP_204_NO_CONTENT,
    responses=_gone_or(UploadKind.CHECKPOINT),
)
def delete_checkpoint(upload_id: UploadId, services: InServices, tenant: Tenant) -> None:
    """Remove a checkpoint, unless a job that is not finished reads it."""
    services.removal.delete_upload(tenant, UploadKind.CHECKPOINT, upload_id)
