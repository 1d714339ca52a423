"""The tables of jobs."""

from __future__ import annotations

import datetime
from typing import Any, Final

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime, now
from service.jobs.states import ANSWERING, JobState
from service.tenants.models import TenantRow

# SQLite numbers the rows itself only when this is its INTEGER.
_NUMBER: Final = BigInteger().with_variant(Integer, "sqlite")


class JobRow(Base):
    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True)  # rises with each submission
    id: Mapped[str] = mapped_column(String(32), unique=True)
    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id))
    kind: Mapped[str] = mapped_column(String(16))
    # Queries leave what is in it alone: PostgreSQL decodes no document with "\u0000", which old ones have.
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    inputs: Mapped[dict[str, str]] = mapped_column(JSON)  # of the request: the ids of what the job works on
    request_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), default=JobState.QUEUED.value)
    revision: Mapped[int] = mapped_column(default=0)  # rises with each change a reader can see
    stage: Mapped[str | None] = mapped_column(String(100))
    fraction: Mapped[float] = mapped_column(Double, default=0.0)
    failure: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    bundle: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    result_bytes: Mapped[int] = mapped_column(BigInteger, default=0)  # files and bundle together
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
    started_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)
    attempt: Mapped[int] = mapped_column(default=0)  # how often the job was started
    losses: Mapped[int] = mapped_column(default=0)  # how often its worker was lost
    worker: Mapped[str | None] = mapped_column(String(64))  # who runs it, or ran it last
    heartbeat: Mapped[int] = mapped_column(BigInteger, default=0)  # raised by its worker now and then
    retry_of: Mapped[str | None] = mapped_column(String(32))
    request_id: Mapped[str | None] = mapped_column(String(64))  # of the HTTP request that submitted it
    trace_parent: Mapped[str | None] = mapped_column(String(55))  # its span, where requests are traced
    expires_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("jobs_by_state", "state", "number"),
        Index("jobs_by_tenant", "tenant", "number"),
        Index("jobs_by_expiry", "expires_at"),
        # The database itself keeps the same work from being queued twice.
        Index(
            "one_job_for_each_request",
            "tenant",
            "request_digest",
            unique=True,
            sqlite_where=state.in_([state.value for state in ANSWERING]),
            postgresql_where=state.in_([state.value for state in ANSWERING]),
        ),
    )


class JobUploadRow(Base):
    """A job reads an upload. Both may be removed, the upload not before the job has ended."""

    __tablename__ = "job_uploads"

    job_number: Mapped[int] = mapped_column(
        _NUMBER, ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True
    )
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    upload: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id))

    __table_args__ = (Index("job_uploads_by_upload", "tenant", "kind", "upload"),)


class IdempotencyKeyRow(Base):
    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    job_number: Mapped[int] = mapped_column(ForeignKey("jobs.number"))
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
