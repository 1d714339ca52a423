"""Queries on what is to be removed."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, exists, literal, or_, select, update
from sqlalchemy.orm import Session, load_only

from service.jobs.models import IdempotencyKeyRow, JobRow, JobUploadRow
from service.jobs.states import FINISHED, UNFINISHED
from service.retention.models import ResultRemovalRow, RetentionPolicyRow
from service.uploads.kinds import UploadKind
from service.uploads.models import UploadRow

_FINISHED = sorted(state.value for state in FINISHED)


def policy(session: Session) -> RetentionPolicyRow | None:
    return session.get(RetentionPolicyRow, 1)


def set_policy(session: Session, days: float | None) -> None:
    session.merge(RetentionPolicyRow(id=1, days=days))


def limit_expiry(session: Session, latest: datetime.datetime | None) -> None:
    """Let no finished job be kept beyond that time; None: let all be kept."""
    is_wrong: ColumnElement[bool] = JobRow.expires_at.is_not(None)
    if latest is not None:
        is_wrong = or_(JobRow.expires_at.is_(None), JobRow.expires_at > latest)
    session.execute(update(JobRow).where(JobRow.state.in_(_FINISHED), is_wrong).values(expires_at=latest))


def lock_expired_job(session: Session, at: datetime.datetime, after: int) -> JobRow | None:
    """The next expired job behind that number which nobody else works on."""
    return session.scalar(
        select(JobRow)
        .where(JobRow.state.in_(_FINISHED), JobRow.expires_at <= at, JobRow.number > after)
        .order_by(JobRow.number)
        .limit(1)
        .options(load_only(JobRow.id, JobRow.tenant))
        .with_for_update(skip_locked=True)
    )


def is_job_needed(session: Session, job: JobRow) -> bool:
    """Whether an unfinished job builds on the result."""
    prepare_job = JobRow.inputs["prepare_job"].as_string()
    query = exists().where(JobRow.state.in_(UNFINISHED), JobRow.tenant == job.tenant, prepare_job == job.id)
    return session.scalar(select(query)) or False


def delete_job(session: Session, job: JobRow, files_due_at: datetime.datetime) -> None:
    session.add(ResultRemovalRow(job=job.id, due_at=files_due_at))
    session.execute(delete(IdempotencyKeyRow).where(IdempotencyKeyRow.job_number == job.number))
    session.execute(delete(JobUploadRow).where(JobUploadRow.job_number == job.number))
    session.delete(job)
    session.flush()


def lock_upload(session: Session, tenant: str, kind: UploadKind, identifier: str) -> UploadRow | None:
    return session.get(UploadRow, (tenant, kind.value, identifier), with_for_update=True)


def unused_uploads(session: Session, before: datetime.datetime) -> Sequence[tuple[str, str, str]]:
    """Tenant, kind and id of uploads that nobody has used since and no job reads."""
    rows = session.execute(
        select(UploadRow.tenant, UploadRow.kind, UploadRow.id).where(
            UploadRow.used_at < before,
            ~exists().where(
                JobUploadRow.tenant == UploadRow.tenant,
                JobUploadRow.kind == UploadRow.kind,
                JobUploadRow.upload == UploadRow.id,
            ),
        )
    )
    return [(tenant, kind, identifier) for tenant, kind, identifier in rows]


def is_upload_read(session: Session, upload: UploadRow, *, by_finished: bool) -> bool:
    """Whether an unfinished job reads the upload, or has a finished one read it too."""
    query = exists().where(
        JobUploadRow.tenant == upload.tenant,
        JobUploadRow.kind == upload.kind,
        JobUploadRow.upload == upload.id,
        JobUploadRow.job_number == JobRow.number,
        literal(by_finished) | JobRow.state.in_(UNFINISHED),
    )
    return session.scalar(select(query)) or False


def due_removals(session: Session, at: datetime.datetime, horizon: datetime.datetime) -> Sequence[str]:
    """Jobs whose files are to go now. Beyond the horizon lies what was planned before the clock went back."""
    return session.scalars(
        select(ResultRemovalRow.job).where(
            or_(ResultRemovalRow.due_at <= at, ResultRemovalRow.due_at > horizon)
        )
    ).all()


def forget_removal(session: Session, job_id: str) -> None:
    session.execute(delete(ResultRemovalRow).where(ResultRemovalRow.job == job_id))
