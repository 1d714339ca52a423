"""Queries on resumable uploads."""

from __future__ import annotations

import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.resumable.models import ResumableUploadRow


def find(session: Session, tenant: str, identifier: str) -> ResumableUploadRow | None:
    row = session.get(ResumableUploadRow, identifier)
    return row if row is not None and row.tenant == tenant else None


def reserved_bytes(session: Session, tenant: str) -> int:
    """Bytes of a tenant's resumable uploads, all of each, that no stored upload has yet."""
    query = select(func.sum(ResumableUploadRow.bytes)).where(
        ResumableUploadRow.tenant == tenant, ResumableUploadRow.stored_as.is_(None)
    )
    return int(session.scalar(query) or 0)


def expired(session: Session, at: datetime.datetime) -> list[str]:
    """Ids of the uploads that have expired by then."""
    return list(session.scalars(select(ResumableUploadRow.id).where(ResumableUploadRow.expires_at < at)))


def all_ids(session: Session) -> set[str]:
    return set(session.scalars(select(ResumableUploadRow.id)))
