"""Queries on the processes that run jobs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.worker.models import WorkerRow


def beat(session: Session, worker: str) -> None:
    """Raise the worker's heartbeat; add it where it is not known, or not any more."""
    beaten = session.scalar(
        update(WorkerRow)
        .where(WorkerRow.id == worker)
        .values(heartbeat=WorkerRow.heartbeat + 1)
        .returning(WorkerRow.id)
    )
    if beaten is None:
        session.add(WorkerRow(id=worker))


def workers(session: Session) -> Sequence[WorkerRow]:
    return session.scalars(select(WorkerRow)).all()


def remove(session: Session, worker: str) -> None:
    session.execute(delete(WorkerRow).where(WorkerRow.id == worker))


def remove_silent(session: Session, worker: str, heartbeat: int) -> None:
    """Remove the worker unless its heart has beaten since."""
    session.execute(delete(WorkerRow).where(WorkerRow.id == worker, WorkerRow.heartbeat == heartbeat))
