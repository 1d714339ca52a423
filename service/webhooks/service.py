"""Webhooks: who is told of a job, what became of each delivery, and the secrets they are signed with."""

from __future__ import annotations

import datetime
import hashlib
import json
import random
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import structlog
from sqlalchemy.orm import Session

from service.database import Database, now
from service.errors import ServiceError, ServiceErrorCode
from service.jobs import repository as jobs
from service.jobs.models import JobRow
from service.jobs.states import FINISHED, JobState
from service.metrics.instruments import WEBHOOKS
from service.settings import Settings
from service.webhooks import outbox, repository
from service.webhooks.addresses import AddressPolicy, AddressRefusedError
from service.webhooks.models import (
    WebhookDeliveryRow,
    WebhookSecretRow,
    WebhookSubscriptionRow,
)
from service.webhooks.schemas import Delivery, DeliveryList, NewWebhookSecret, Webhook, WebhookSecret
from service.webhooks.signing import new_secret
from service.webhooks.states import DeliveryState

log = structlog.get_logger()

_LARGEST_PER_JOB: Final = 16
_ROTATION: Final = datetime.timedelta(days=1)
# What a process that sends has for writing down the result, before another one sends again.
_LEASE_MARGIN_SECONDS: Final = 5.0
_JITTER: Final = 0.2


@dataclass(frozen=True)
class Sending:
    """A delivery that this process is to send now."""

    id: str
    tenant: str
    job: str
    event: str
    attempt: int
    url: str
    body: bytes
    secrets: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Sending({self.id}, attempt {self.attempt})"  # neither secrets nor addresses in a traceback


class WebhookService:
    """Safe to use from several threads and processes."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._delays = settings.webhook_retry_seconds
        self._lease = settings.webhook_timeout_seconds + _LEASE_MARGIN_SECONDS
        # Nothing is ever planned further ahead than this.
        self._longest = datetime.timedelta(seconds=max((self._lease, *self._delays)) * (1 + _JITTER))
        self.addresses: Final = AddressPolicy(settings.webhook_allow_private, settings.webhook_ports)
        """Where webhooks may go."""

    # What clients ask.

    def check(self, webhook: Webhook) -> None:
        """Raises: ServiceError: `webhook_url_refused`."""
        try:
            self.addresses.parse(webhook.url)
        except AddressRefusedError as error:
            raise ServiceError(
                ServiceErrorCode.WEBHOOK_URL_REFUSED, str(error), field="webhook.url"
            ) from error

    def deliveries(self, tenant: str, job_id: str) -> DeliveryList:
        """What was told of a job, and how far that got.

        Raises:
            ServiceError: `job_not_found`.
        """
        with self._database.reading() as session:
            _require_job(session, tenant, job_id)
            rows = repository.deliveries(session, job_id)
        return DeliveryList(items=[Delivery.model_validate(row) for row in rows])

    def redeliver(self, tenant: str, job_id: str, delivery_id: str) -> Delivery:
        """Send an event again, with all its attempts, whatever became of it before.

        Raises:
            ServiceError: `job_not_found`, `delivery_not_found`.
        """
        with self._database.writing() as session:
            _require_job(session, tenant, job_id)
            row = repository.lock_delivery(session, job_id, delivery_id)
            if row is None:
                raise ServiceError(
                    ServiceErrorCode.DELIVERY_NOT_FOUND, "The job has no delivery with this id."
                )
            row.state = DeliveryState.PENDING.value
            row.attempts = 0
            row.next_attempt_at = now()
            session.flush()
            return Delivery.model_validate(row)

    def secret(self, tenant: str) -> WebhookSecret:
        """Since when there is a secret.

        Raises:
            ServiceError: `webhook_secret_missing`.
        """
        with self._database.reading() as session:
            row = repository.secret(session, tenant)
        if row is None:
            raise _secret_missing()
        return WebhookSecret.model_validate(row)

    def rotate(self, tenant: str) -> NewWebhookSecret:
        """Make a secret, the first or another one; for a day the one before signs too."""

        def change(session: Session) -> WebhookSecretRow:
            row = repository.secret(session, tenant, lock=True)
            if row is None:
                row = WebhookSecretRow(tenant=tenant, secret=new_secret())
                repository.add(session, row)
            else:
                row.previous, row.previous_until = row.secret, now() + _ROTATION
                row.secret, row.created_at = new_secret(), now()
            return row

        row = self._database.write(change)
        log.info("webhook secret made", tenant=tenant, rotated=row.previous is not None)
        return NewWebhookSecret.model_validate(row)

    # What happens within the transactions of jobs.

    def subscribe(self, session: Session, job: JobRow, webhook: Webhook) -> None:
        """Have a webhook told of a job, whose row is locked; of its end at once if that is past.

        The same webhook is told once, however often it subscribes.

        Raises:
            ServiceError: `webhook_secret_missing`, `webhook_limit_reached`.
        """
        secret = None if webhook.secret is None else webhook.secret.get_secret_value()
        if secret is None and repository.secret(session, job.tenant) is None:
            raise _secret_missing()
        events = sorted(set(webhook.events))
        self._subscribe(session, job, webhook.url, [event.value for event in events], secret)

    def subscribe_as(self, session: Session, job: JobRow, other: str) -> None:
        """Have everybody told of a job, whose row is locked, who is told of the other one."""
        for known in repository.subscriptions(session, other):
            self._subscribe(session, job, known.url, known.events, known.secret)

    def _subscribe(
        self, session: Session, job: JobRow, url: str, events: list[str], secret: str | None
    ) -> None:
        digest = hashlib.sha256(json.dumps([url, events, secret]).encode()).hexdigest()
        known = repository.subscriptions(session, job.id)
        if digest in (row.digest for row in known):
            return
        if len(known) >= _LARGEST_PER_JOB:
            raise ServiceError(
                ServiceErrorCode.WEBHOOK_LIMIT_REACHED,
                f"The job has {_LARGEST_PER_JOB} webhooks already; it takes no more.",
                field="webhook",
            )
        row = WebhookSubscriptionRow(
            id=uuid.uuid4().hex,
            tenant=job.tenant,
            job=job.id,
            url=url,
            events=events,
            secret=secret,
            digest=digest,
        )
        repository.add(session, row)
        if JobState(job.state) in FINISHED:
            outbox.announce(session, job, [row])

    # What the sender asks.

    def claim(self, limit: int, other_than: Collection[str] = ()) -> list[Sending]:
        """Take up to so many deliveries that are due, of other tenants than those, to send them now.

        Should this process die, they are due again when the time for sending them is over.
        """
        at = now()
        horizon = at + self._longest
        with self._database.reading() as session:  # writers wait for each other; most often nothing is due
            if not repository.is_any_due(session, at, horizon):
                return []
        lease = at + datetime.timedelta(seconds=self._lease)
        with self._database.writing() as session:
            rows = repository.lock_due(session, at, horizon, limit=limit, other_than=other_than)
            for row in rows:
                row.attempts += 1
                row.next_attempt_at = lease
            session.flush()
            return [_sending(session, row, at) for row in rows]

    def delivered(self, sending: Sending, status: int) -> None:
        """The receiver has taken it."""
        self._record(
            sending,
            state=DeliveryState.DELIVERED.value,
            next_attempt_at=None,
            last_status=status,
            last_error=None,
            delivered_at=now(),
        )
        WEBHOOKS.labels("delivered").inc()
        log.info(
            "webhook delivered", job=sending.job, delivery=sending.id, event_type=sending.event, status=status
        )

    def failed(self, sending: Sending, reason: str, status: int | None) -> None:
        """The receiver has not taken it: it is sent again later, unless that has been tried often enough."""
        gives_up = status == HTTPStatus.GONE or sending.attempt > len(self._delays)
        delay = 0.0 if gives_up else self._delays[sending.attempt - 1]
        # At different times for different messages, so that they do not come together again and again.
        delay *= random.uniform(1 - _JITTER, 1 + _JITTER)
        self._record(
            sending,
            state=(DeliveryState.FAILED if gives_up else DeliveryState.PENDING).value,
            next_attempt_at=None if gives_up else now() + datetime.timedelta(seconds=delay),
            last_status=status,
            last_error=reason,
        )
        WEBHOOKS.labels("given_up" if gives_up else "failed").inc()
        log.warning(
            "webhook given up" if gives_up else "webhook not delivered",
            job=sending.job,
            delivery=sending.id,
            event_type=sending.event,
            attempt=sending.attempt,
            reason=reason,
        )

    def forget_deleted_jobs(self) -> None:
        """Remove what was told of jobs that are gone. What is still to be told of them stays until it is."""
        with self._database.writing() as session:
            repository.forget_deleted_jobs(session)

    def _record(self, sending: Sending, **values: object) -> None:
        with self._database.writing() as session:
            repository.record(session, sending.id, sending.attempt, **values)


def _sending(session: Session, row: WebhookDeliveryRow, at: datetime.datetime) -> Sending:
    own = repository.subscription(session, row.subscription).secret
    return Sending(
        id=row.id,
        tenant=row.tenant,
        job=row.job,
        event=row.event,
        attempt=row.attempts,
        url=row.url,
        body=row.body.encode(),
        secrets=(own,) if own is not None else _tenant_secrets(session, row.tenant, at),
    )


def _tenant_secrets(session: Session, tenant: str, at: datetime.datetime) -> tuple[str, ...]:
    row = repository.secret(session, tenant)
    assert row is not None, "a subscription without a secret was taken because its tenant has one"
    if row.previous is None or row.previous_until is None or row.previous_until <= at:
        return (row.secret,)
    return row.secret, row.previous


def _require_job(session: Session, tenant: str, job_id: str) -> None:
    if jobs.find(session, tenant, job_id) is None:
        raise ServiceError(ServiceErrorCode.JOB_NOT_FOUND, "There is no job with this id.")


def _secret_missing() -> ServiceError:
    return ServiceError(
        ServiceErrorCode.WEBHOOK_SECRET_MISSING,
        "There is no secret to sign with: make one with POST /v1/webhook-secret, or give webhook.secret.",
        field="webhook.secret",
    )
