"""Queries on webhooks."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, or_, select, update
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session

from service.jobs.models import JobRow
from service.webhooks.models import (
    WebhookDeliveryRow,
    WebhookSecretRow,
    WebhookSubscriptionRow,
)
from service.webhooks.states import DeliveryState


def subscriptions(session: Session, job_id: str) -> Sequence[WebhookSubscriptionRow]:
    return session.scalars(select(WebhookSubscriptionRow).where(WebhookSubscriptionRow.job == job_id)).all()


def add(session: Session, row: WebhookSubscriptionRow | WebhookDeliveryRow | WebhookSecretRow) -> None:
    session.add(row)
    session.flush()


def deliveries(session: Session, job_id: str) -> Sequence[WebhookDeliveryRow]:
    return session.scalars(
        select(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.job == job_id)
        .order_by(WebhookDeliveryRow.created_at, WebhookDeliveryRow.id)
    ).all()


def lock_delivery(session: Session, job_id: str, delivery_id: str) -> WebhookDeliveryRow | None:
    """A delivery as it is now; no attempt at it is noted before the transaction ends."""
    row = session.get(WebhookDeliveryRow, delivery_id, with_for_update=True)
    return row if row is not None and row.job == job_id else None


def subscription(session: Session, identifier: str) -> WebhookSubscriptionRow:
    return session.get_one(WebhookSubscriptionRow, identifier)


def secret(session: Session, tenant: str, *, lock: bool = False) -> WebhookSecretRow | None:
    return session.get(WebhookSecretRow, tenant, with_for_update=lock or None)


def _due(at: datetime.datetime, horizon: datetime.datetime) -> ColumnElement[bool]:
    """To be sent now. What lies beyond the horizon was planned before the clock was set back."""
    return and_(
        WebhookDeliveryRow.state == DeliveryState.PENDING.value,
        or_(WebhookDeliveryRow.next_attempt_at <= at, WebhookDeliveryRow.next_attempt_at > horizon),
    )


def is_any_due(session: Session, at: datetime.datetime, horizon: datetime.datetime) -> bool:
    return session.scalar(select(exists().where(_due(at, horizon)))) or False


def lock_due(
    session: Session,
    at: datetime.datetime,
    horizon: datetime.datetime,
    *,
    limit: int,
    other_than: Collection[str],
) -> Sequence[WebhookDeliveryRow]:
    """What has waited longest, but for some tenants; other processes skip it until the transaction ends."""
    return session.scalars(
        select(WebhookDeliveryRow)
        .where(_due(at, horizon), WebhookDeliveryRow.tenant.not_in(other_than))
        .order_by(WebhookDeliveryRow.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()


def record(session: Session, delivery_id: str, attempt: int, **values: Any) -> None:
    """Note what came of an attempt, unless one of another number has begun."""
    session.execute(
        update(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.id == delivery_id, WebhookDeliveryRow.attempts == attempt)
        .values(**values)
    )


def forget_deleted_jobs(session: Session) -> None:
    """Remove what belongs to jobs that are gone, once nothing of it is still to be sent."""
    is_gone = ~exists().where(JobRow.id == WebhookDeliveryRow.job)
    session.execute(
        delete_from(WebhookDeliveryRow).where(
            is_gone, WebhookDeliveryRow.state != DeliveryState.PENDING.value
        )
    )
    session.execute(
        delete_from(WebhookSubscriptionRow).where(
            ~exists().where(JobRow.id == WebhookSubscriptionRow.job),
            ~exists().where(WebhookDeliveryRow.subscription == WebhookSubscriptionRow.id),
        )
    )
