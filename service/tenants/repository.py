"""Queries on tenants and API keys."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from service.tenants.models import ApiKeyRow, TenantRow


def find(session: Session, identifier: str) -> TenantRow | None:
    return session.get(TenantRow, identifier)


def locked(session: Session, identifier: str) -> TenantRow:
    """A tenant whose quotas, if it has any, nobody else uses up until the transaction ends.

    SQLite lets only one writer in anyway. On PostgreSQL this does not hold up rows that merely refer to it.
    """
    row = session.get_one(TenantRow, identifier)
    if row.max_bytes is not None or row.max_queued_jobs is not None:
        session.refresh(row, with_for_update={"key_share": True})
    return row


def all_tenants(session: Session) -> Sequence[TenantRow]:
    return session.scalars(select(TenantRow).order_by(TenantRow.id)).all()


def find_key(session: Session, identifier: str) -> ApiKeyRow | None:
    return session.get(ApiKeyRow, identifier)


def keys(session: Session, tenant: str | None) -> Sequence[ApiKeyRow]:
    query = select(ApiKeyRow).order_by(ApiKeyRow.created_at)
    return session.scalars(query if tenant is None else query.where(ApiKeyRow.tenant == tenant)).all()


def usable_keys(session: Session, at: datetime.datetime) -> int:
    """How many keys are neither revoked nor expired."""
    return session.scalars(
        select(func.count())
        .select_from(ApiKeyRow)
        .where(ApiKeyRow.revoked_at.is_(None), or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > at))
    ).one()


def note_use(session: Session, key: str, at: datetime.datetime, unless_since: datetime.datetime) -> None:
    """Record that a key was used, unless another request did so a moment ago."""
    session.execute(
        update(ApiKeyRow)
        .where(
            ApiKeyRow.id == key,
            or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < unless_since),
        )
        .values(last_used_at=at)
    )
