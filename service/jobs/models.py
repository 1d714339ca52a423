"""The tables of jobs."""

from __future__ import annotations

import datetime
import enum
from typing import Any, Final

from sqlalchemy import JSON, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime, now


class JobKind(enum.StrEnum):
    """What a job does."""

    PREPARE = "prepare"
    FINALIZE = "finalize"


class JobState(enum.StrEnum):
    """Where a job stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINISHED: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# A job that answers for its request; a new one is made when it failed or was cancelled.
ANSWERING: Final = (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED)


class JobRow(Base):
    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(primary_key=True)  # rises with each submission
    id: Mapped[str] = mapped_column(String(32), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    request_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), default=JobState.QUEUED.value)
    revision: Mapped[int] = mapped_column(default=0)  # rises with each change a reader can see
    stage: Mapped[str | None] = mapped_column(String(100))
    fraction: Mapped[float] = mapped_column(default=0.0)
    failure: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    bundle: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
    started_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("jobs_by_state", "state", "number"),
        # The database itself keeps the same work from being queued twice.
        Index(
            "one_job_for_each_request",
            "request_digest",
            unique=True,
            sqlite_where=state.in_([state.value for state in ANSWERING]),
        ),
    )


class IdempotencyKeyRow(Base):
    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    job_number: Mapped[int] = mapped_column(ForeignKey("jobs.number"))
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
