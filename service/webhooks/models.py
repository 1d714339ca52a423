"""The tables of webhooks: who is to be told of a job, what is to be told, and with which secrets."""

from __future__ import annotations

import datetime

from sqlalchemy import JSON, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime, now
from service.tenants.models import TenantRow
from service.webhooks.states import DeliveryState


class WebhookSubscriptionRow(Base):
    """Somebody is to be told of a job's changes. The same wish is kept once, however often it is sent."""

    __tablename__ = "webhook_subscriptions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id))
    job: Mapped[str] = mapped_column(String(32))
    url: Mapped[str] = mapped_column(String(2048))
    events: Mapped[list[str]] = mapped_column(JSON)
    secret: Mapped[str | None] = mapped_column(String(100))  # null: the tenant's
    digest: Mapped[str] = mapped_column(String(64))  # of url, events and secret
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)

    __table_args__ = (UniqueConstraint("job", "digest", name="one_webhook_for_each_wish"),)


class WebhookDeliveryRow(Base):
    """One event of a job that is to be told to somebody, and how far that got."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id))
    subscription: Mapped[str] = mapped_column(String(32), ForeignKey(WebhookSubscriptionRow.id))
    job: Mapped[str] = mapped_column(String(32))
    event: Mapped[str] = mapped_column(String(32))
    url: Mapped[str] = mapped_column(String(2048))
    body: Mapped[str] = mapped_column(Text)  # as it is signed and sent, the same at each attempt
    state: Mapped[str] = mapped_column(String(16), default=DeliveryState.PENDING.value)
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)
    last_status: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(String(1000))
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
    delivered_at: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("webhook_deliveries_due", "state", "next_attempt_at"),
        Index("webhook_deliveries_of_job", "job"),
    )


class WebhookSecretRow(Base):
    """What a tenant's webhooks are signed with, and for a while also what they were signed with before."""

    __tablename__ = "webhook_secrets"

    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id), primary_key=True)
    secret: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
    previous: Mapped[str | None] = mapped_column(String(100))
    previous_until: Mapped[datetime.datetime | None] = mapped_column(UtcDateTime)
