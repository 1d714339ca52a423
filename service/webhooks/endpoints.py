"""Webhooks over HTTP: their deliveries and the tenant's secret. Jobs take them in their requests."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Response, status

from service.dependencies import InServices, Tenant
from service.errors import ServiceErrorCode
from service.jobs.schemas import JobId
from service.problems import problem_responses
from service.webhooks.schemas import (
    Delivery,
    DeliveryId,
    DeliveryList,
    JobEvent,
    NewWebhookSecret,
    WebhookSecret,
)

router = APIRouter(tags=["webhooks"])
events = APIRouter(tags=["webhooks"])
"""What the service sends, for the description of the API."""

_JOB_ERRORS: Final = (ServiceErrorCode.JOB_NOT_FOUND, ServiceErrorCode.REQUEST_INVALID)


@router.get("/v1/jobs/{job_id}/deliveries", responses=problem_responses(*_JOB_ERRORS))
def list_deliveries(job_id: JobId, services: InServices, tenant: Tenant) -> DeliveryList:
    """What was told to the job's webhooks, and how far that got."""
    return services.webhooks.deliveries(tenant, job_id)


@router.post(
    "/v1/jobs/{job_id}/deliveries/{delivery_id}/redeliver",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problem_responses(*_JOB_ERRORS, ServiceErrorCode.DELIVERY_NOT_FOUND),
)
def redeliver(job_id: JobId, delivery_id: DeliveryId, services: InServices, tenant: Tenant) -> Delivery:
    """Send an event again, under the same webhook-id."""
    return services.webhooks.redeliver(tenant, job_id, delivery_id)


@router.get("/v1/webhook-secret", responses=problem_responses(ServiceErrorCode.WEBHOOK_SECRET_MISSING))
def get_webhook_secret(services: InServices, tenant: Tenant) -> WebhookSecret:
    """Since when there is a secret for webhooks that have none of their own. It is not shown."""
    return services.webhooks.secret(tenant)


@router.post("/v1/webhook-secret", status_code=status.HTTP_201_CREATED, responses=problem_responses())
def rotate_webhook_secret(response: Response, services: InServices, tenant: Tenant) -> NewWebhookSecret:
    """Make a new secret and show it, this once. For a day the one before signs too."""
    response.headers["Cache-Control"] = "no-store"
    return services.webhooks.rotate(tenant)


@events.post("job", status_code=status.HTTP_204_NO_CONTENT)
def job_event(event: JobEvent) -> None:
    """Sent when a job comes into a state, signed as the Standard Webhooks specification says.

    Headers: `webhook-id` (the same at each attempt), `webhook-timestamp`, `webhook-signature`. Any 2xx
    answer takes the event; 410 refuses it for good; after anything else it is sent again.
    """
