"""Webhooks as they cross the wire."""

from __future__ import annotations

import datetime
import enum
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from service.errors import Cause, ServiceError, ServiceErrorCode
from service.jobs.states import JobKind, JobState
from service.uploads.schemas import StoredFile
from service.webhooks.signing import key_of
from service.webhooks.states import DeliveryState

DeliveryId = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{32}$"), Field(description="id of a delivery")
]


class WebhookEvent(enum.StrEnum):
    """What a webhook tells: the job has come into this state."""

    RUNNING = "job.running"
    SUCCEEDED = "job.succeeded"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"


FINAL_EVENTS: Final = (WebhookEvent.SUCCEEDED, WebhookEvent.FAILED, WebhookEvent.CANCELLED)


def _checked(secret: SecretStr) -> SecretStr:
    key_of(secret.get_secret_value())
    return secret


# What `_checked` demands, for the description of the API: 24 to 64 bytes in base64.
_SECRET_SCHEMA: Final = {
    "type": "string",
    "format": "password",
    "writeOnly": True,
    "pattern": "^whsec_(Q{8,21}|Q{8,20}(B{3}=|B{2}==)|Q{21}B{2}==)$".replace("Q", "(B{4})").replace(
        "B", "[A-Za-z0-9+/]"
    ),
}


class Webhook(BaseModel):
    """Whom to tell of a job's changes of state."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(max_length=2048, description="http(s) address to which events are posted")
    secret: Annotated[SecretStr, AfterValidator(_checked), WithJsonSchema(_SECRET_SCHEMA)] | None = Field(
        default=None,
        description="`whsec_` and the base64 of 24 to 64 bytes; null: the tenant's own secret",
    )
    events: tuple[WebhookEvent, ...] = Field(default=FINAL_EVENTS, min_length=1, max_length=16)


def parse_webhook(text: bytes | None) -> Webhook | None:
    """A webhook in a form field. Raises: ServiceError: `request_invalid`."""
    if text is None:
        return None
    try:
        return Webhook.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(("webhook", *(str(part) for part in first["loc"])))
        raise ServiceError(ServiceErrorCode.REQUEST_INVALID, f"{first['msg']}.", field=field) from None


class JobEventData(BaseModel):
    """The job as it was then; `GET /v1/jobs/{id}` says the same and more."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    kind: JobKind
    state: JobState
    revision: int = Field(description="rises with each change; events may arrive in another order")
    failure: Cause | None
    files: list[StoredFile]
    bundle: StoredFile | None
    retry_of: str | None
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None


class JobEvent(BaseModel):
    """Body of a webhook request."""

    type: WebhookEvent
    timestamp: datetime.datetime = Field(description="when the job came into the state")
    data: JobEventData


class Delivery(BaseModel):
    """An event on its way to a webhook."""

    model_config = ConfigDict(from_attributes=True)

    id: DeliveryId = Field(description="also the request's webhook-id")
    event: WebhookEvent
    url: str
    state: DeliveryState
    attempts: int = Field(description="how often it was sent, or is being sent")
    next_attempt_at: datetime.datetime | None = Field(description="null when there will be none")
    last_status: int | None = Field(description="HTTP status of the last answer")
    last_error: str | None = Field(description="why the last attempt did not succeed")
    created_at: datetime.datetime
    delivered_at: datetime.datetime | None


class DeliveryList(BaseModel):
    """All deliveries of a job, the oldest first."""

    items: list[Delivery]


class WebhookSecret(BaseModel):
    """What is said of the tenant's secret."""

    model_config = ConfigDict(from_attributes=True)

    created_at: datetime.datetime
    previous_until: datetime.datetime | None = Field(
        description="until then requests carry a second signature, made with the secret before"
    )


class NewWebhookSecret(WebhookSecret):
    """The tenant's new secret. It is not shown again."""

    secret: str = Field(description="`whsec_` and base64")
