"""Quotas: what a tenant uses is counted in the transaction that adds to it.

    with the tenant locked (`repository.locked`): look, count, add

so that requests at the same time cannot exceed a quota together. What is used is counted anew each time:
a counter beside the rows could come to differ from them.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import ServiceError, ServiceErrorCode
from service.jobs.models import JobRow
from service.jobs.states import FINISHED
from service.resumable.repository import reserved_bytes
from service.tenants.models import TenantRow
from service.uploads.models import UploadRow

# When a client that met the quota of jobs may ask again; how long jobs take is not known.
_JOB_RETRY_SECONDS: Final = 10


def stored_bytes(session: Session, tenant: str) -> int:
    """Bytes of a tenant's uploads, also of those that are arriving, and of results."""
    uploads = select(func.sum(UploadRow.bytes)).where(UploadRow.tenant == tenant)
    results = select(func.sum(JobRow.result_bytes)).where(JobRow.tenant == tenant)
    stored = int(session.scalar(uploads) or 0) + int(session.scalar(results) or 0)
    return stored + reserved_bytes(session, tenant)


def unfinished_jobs(session: Session, tenant: str) -> int:
    """How many of a tenant's jobs are queued or running."""
    query = (
        select(func.count())
        .select_from(JobRow)
        .where(JobRow.tenant == tenant, JobRow.state.not_in([state.value for state in FINISHED]))
    )
    return session.scalars(query).one()


def require_bytes(session: Session, tenant: TenantRow, size: int) -> None:
    """Raises: ServiceError: `storage_quota_exceeded`, when the tenant may not store that many bytes more."""
    if tenant.max_bytes is None:
        return
    used = stored_bytes(session, tenant.id)
    if used + size > tenant.max_bytes:
        raise ServiceError(
            ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
            f"The upload has {size} bytes; {used} of your {tenant.max_bytes} are used.",
        )


def require_job(session: Session, tenant: TenantRow) -> None:
    """Raises: ServiceError: `job_quota_exceeded` or `storage_quota_exceeded`, when no more job may be queued.

    How much a job will store is not known before: a tenant who has used up all bytes gets no more jobs, and
    a job that was accepted is not failed for its result.
    """
    if tenant.max_bytes is not None and stored_bytes(session, tenant.id) >= tenant.max_bytes:
        raise ServiceError(
            ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
            f"All of the {tenant.max_bytes} bytes that you may store are used.",
        )
    if tenant.max_queued_jobs is None:
        return
    unfinished = unfinished_jobs(session, tenant.id)
    if unfinished >= tenant.max_queued_jobs:
        raise ServiceError(
            ServiceErrorCode.JOB_QUOTA_EXCEEDED,
            f"{unfinished} of your jobs are queued or running, as many as you may have; wait for one to end.",
            headers={"Retry-After": str(_JOB_RETRY_SECONDS)},
        )
