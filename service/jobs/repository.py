"""Queries on jobs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, func, literal, select, update
from sqlalchemy.orm import Session, defer, load_only

from service.jobs.models import IdempotencyKeyRow, JobRow, JobUploadRow
from service.jobs.states import ANSWERING, UNFINISHED, JobState
from service.uploads.kinds import UploadKind
from service.webhooks import outbox


def find(session: Session, tenant: str, job_id: str) -> JobRow | None:
    return session.scalar(select(JobRow).where(JobRow.id == job_id, JobRow.tenant == tenant))


def get(session: Session, job_id: str) -> JobRow | None:
    """A job of any tenant, for workers."""
    return session.scalar(select(JobRow).where(JobRow.id == job_id))


def lock(session: Session, tenant: str, job_id: str) -> JobRow | None:
    """A job that stays as it is until the transaction ends."""
    return session.scalar(
        select(JobRow)
        .where(JobRow.id == job_id, JobRow.tenant == tenant)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )


def lock_answering(session: Session, tenant: str, request_digest: str) -> JobRow | None:
    """The job that does, or did, the work of a request; it stays as it is until the transaction ends."""
    return session.scalar(
        select(JobRow)
        .where(
            JobRow.tenant == tenant,
            JobRow.request_digest == request_digest,
            # Written out, as the index has them, and not as parameters: so that it is used.
            JobRow.state.in_([literal(state.value, literal_execute=True) for state in ANSWERING]),
        )
        .with_for_update(key_share=True)
    )


def page(
    session: Session, tenant: str, *, state: str | None, cursor: int | None, limit: int
) -> Sequence[JobRow]:
    """A tenant's jobs from the newest, beginning below the cursor, without their requests."""
    query = _summaries().where(JobRow.tenant == tenant).order_by(JobRow.number.desc()).limit(limit)
    if state is not None:
        query = query.where(JobRow.state == state)
    if cursor is not None:
        query = query.where(JobRow.number < cursor)
    return session.scalars(query).all()


def find_summary(session: Session, tenant: str, job_id: str) -> JobRow | None:
    """A job without its request."""
    return session.scalar(_summaries().where(JobRow.id == job_id, JobRow.tenant == tenant))


def summaries(session: Session, job_ids: Sequence[str]) -> Sequence[JobRow]:
    """Jobs of any tenants without their requests, in any order; those that are gone are left out."""
    return session.scalars(_summaries().where(JobRow.id.in_(job_ids))).all()


def revisions(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """The revisions of jobs of any tenants; those that are gone are left out."""
    query = select(JobRow.id, JobRow.revision).where(JobRow.id.in_(job_ids))
    return {row.id: row.revision for row in session.execute(query)}


def _summaries() -> Select[JobRow]:
    # The recipes stay in the database: those of a page are more than all else of it.
    return select(JobRow).options(defer(JobRow.request, raiseload=True))


def add(session: Session, row: JobRow, uploads: Sequence[tuple[UploadKind, str]]) -> None:
    """Add a job, which reads these uploads."""
    session.add(row)
    session.flush()
    for kind, identifier in uploads:
        session.add(
            JobUploadRow(job_number=row.number, tenant=row.tenant, kind=kind.value, upload=identifier)
        )
    session.flush()


def find_key(session: Session, tenant: str, key: str) -> IdempotencyKeyRow | None:
    return session.get(IdempotencyKeyRow, (tenant, key))


def add_key(session: Session, key: str, job: JobRow, request_digest: str) -> None:
    session.add(
        IdempotencyKeyRow(tenant=job.tenant, key=key, request_digest=request_digest, job_number=job.number)
    )
    session.flush()


def lock_by_number(session: Session, number: int) -> JobRow | None:
    return session.scalar(select(JobRow).where(JobRow.number == number).with_for_update(key_share=True))


def change(
    session: Session,
    job_id: str,
    when: Sequence[JobState],
    *conditions: ColumnElement[bool],
    **values: Any,
) -> bool:
    """Change a job if it is in one of the given states; says whether it was.

    A change of its state is noted for its webhooks in the same transaction.
    """
    changed = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.state.in_(when), *conditions)
        .values(revision=JobRow.revision + 1, **values)
        .returning(JobRow.number)
    )
    if changed is not None and "state" in values:
        outbox.announce(session, session.get_one(JobRow, changed, populate_existing=True))
    return changed is not None


# For workers: the rows of all tenants. A locked row keeps other writers out until the transaction ends;
# on SQLite a transaction that writes keeps all others out anyway.


def lock_queued(session: Session, job_id: str | None) -> JobRow | None:
    """A queued job that nobody else is about to take: the one of that id, or the oldest."""
    query = select(JobRow).where(JobRow.state == JobState.QUEUED).order_by(JobRow.number).limit(1)
    if job_id is not None:
        query = query.where(JobRow.id == job_id)
    return session.scalar(query.with_for_update(skip_locked=True))


def queued(session: Session, limit: int) -> Sequence[str]:
    """Ids of queued jobs, the oldest first."""
    return session.scalars(
        select(JobRow.id).where(JobRow.state == JobState.QUEUED).order_by(JobRow.number).limit(limit)
    ).all()


def is_held(session: Session, job_id: str, attempt: int) -> bool:
    query = select(JobRow.number).where(JobRow.id == job_id, *_in_attempt(attempt))
    return session.scalar(query) is not None


def beat(session: Session, job_id: str, attempt: int) -> bool:
    """Raise the heartbeat; no change that a reader of the job would see."""
    beaten = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id, *_in_attempt(attempt))
        .values(heartbeat=JobRow.heartbeat + 1)
        .returning(JobRow.number)
    )
    return beaten is not None


def count_unfinished(session: Session) -> dict[JobState, int]:
    """How many jobs are in each state that is not final; a state without jobs is left out."""
    query = select(JobRow.state, func.count()).where(JobRow.state.in_(UNFINISHED)).group_by(JobRow.state)
    return {JobState(state): count for state, count in session.execute(query)}


def oldest_queued_at(session: Session) -> datetime.datetime | None:
    """When the queued job was submitted that is next."""
    query = select(JobRow.created_at).where(JobRow.state == JobState.QUEUED).order_by(JobRow.number).limit(1)
    return session.scalar(query)


def result_bytes(session: Session) -> int:
    """Of the results of all jobs."""
    return int(session.scalar(select(func.sum(JobRow.result_bytes))) or 0)


def busy_workers(session: Session) -> Sequence[str]:
    """Who runs the running jobs."""
    query = select(JobRow.worker).where(JobRow.state == JobState.RUNNING, JobRow.worker.is_not(None))
    return [worker for worker in session.scalars(query) if worker is not None]


def running(session: Session) -> Sequence[JobRow]:
    return session.scalars(
        select(JobRow)
        .where(JobRow.state == JobState.RUNNING)
        .options(load_only(JobRow.id, JobRow.attempt, JobRow.heartbeat))
    ).all()


def lock_silent(session: Session, job_id: str, attempt: int, heartbeat: int) -> JobRow | None:
    """A running job if nothing of it has changed."""
    return session.scalar(
        select(JobRow)
        .where(JobRow.id == job_id, JobRow.heartbeat == heartbeat, *_in_attempt(attempt))
        .with_for_update()
    )


def _in_attempt(attempt: int) -> tuple[ColumnElement[bool], ...]:
    return JobRow.state == JobState.RUNNING, JobRow.attempt == attempt
