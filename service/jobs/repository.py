"""Queries on jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.jobs.models import ANSWERING, IdempotencyKeyRow, JobRow, JobState


def find(session: Session, job_id: str) -> JobRow | None:
    return session.scalar(select(JobRow).where(JobRow.id == job_id))


def find_answering(session: Session, request_digest: str) -> JobRow | None:
    """The job that does, or did, the work of a request."""
    return session.scalar(
        select(JobRow).where(JobRow.request_digest == request_digest, JobRow.state.in_(ANSWERING))
    )


def page(session: Session, *, state: str | None, cursor: int | None, limit: int) -> Sequence[JobRow]:
    """Jobs from the newest, beginning below the cursor."""
    query = select(JobRow).order_by(JobRow.number.desc()).limit(limit)
    if state is not None:
        query = query.where(JobRow.state == state)
    if cursor is not None:
        query = query.where(JobRow.number < cursor)
    return session.scalars(query).all()


def add(session: Session, row: JobRow) -> None:
    session.add(row)
    session.flush()


def find_key(session: Session, key: str) -> IdempotencyKeyRow | None:
    return session.get(IdempotencyKeyRow, key)


def add_key(session: Session, key: str, job: JobRow) -> None:
    session.add(IdempotencyKeyRow(key=key, request_digest=job.request_digest, job_number=job.number))


def get_by_number(session: Session, number: int) -> JobRow:
    return session.get_one(JobRow, number)


def oldest_queued(session: Session) -> JobRow | None:
    return session.scalar(
        select(JobRow).where(JobRow.state == JobState.QUEUED).order_by(JobRow.number).limit(1)
    )


def change(session: Session, job_id: str, when: Sequence[JobState], **values: Any) -> bool:
    """Change a job if it is in one of the given states; says whether it was."""
    changed = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.state.in_(when))
        .values(revision=JobRow.revision + 1, **values)
        .returning(JobRow.number)
    )
    return changed is not None


def requeue_running(session: Session, **values: Any) -> Sequence[str]:
    """Queue every running job again; their ids."""
    return session.scalars(
        update(JobRow)
        .where(JobRow.state == JobState.RUNNING)
        .values(state=JobState.QUEUED.value, revision=JobRow.revision + 1, **values)
        .returning(JobRow.id)
    ).all()
