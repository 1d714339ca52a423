"""What is to be told is written down in the transaction in which it happens, and sent afterwards.

So nothing is told that did not happen, and nothing that happened is forgotten, whenever a process dies.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.database import now
from service.jobs.models import JobRow
from service.webhooks import repository
from service.webhooks.models import WebhookDeliveryRow, WebhookSubscriptionRow
from service.webhooks.schemas import JobEvent, JobEventData, WebhookEvent


def announce(
    session: Session, job: JobRow, subscribers: Sequence[WebhookSubscriptionRow] | None = None
) -> None:
    """Note for the subscribers, all of the job's without any given, that the job is in its state."""
    name = f"job.{job.state}"
    if subscribers is None:
        subscribers = repository.subscriptions(session, job.id)
    listening = [subscriber for subscriber in subscribers if name in subscriber.events]
    if not listening:
        return
    at = now()
    event = JobEvent(type=WebhookEvent(name), timestamp=at, data=JobEventData.model_validate(job))
    body = event.model_dump_json()
    for subscriber in listening:
        row = WebhookDeliveryRow(
            id=uuid.uuid4().hex,
            tenant=subscriber.tenant,
            subscription=subscriber.id,
            job=job.id,
            event=name,
            url=subscriber.url,
            body=body,
            next_attempt_at=at,
        )
        repository.add(session, row)
