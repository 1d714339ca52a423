"""Tenants and keys as they cross the wire, and as the command line shows them."""

from __future__ import annotations

import datetime

from pydantic import BaseModel, ConfigDict, Field


class Quotas(BaseModel):
    """What a tenant may use; null is without limit."""

    model_config = ConfigDict(from_attributes=True)

    max_bytes: int | None = Field(default=None, ge=0, description="stored uploads and results")
    max_queued_jobs: int | None = Field(default=None, ge=0, description="jobs that are queued or running")
    requests_per_minute: int | None = Field(default=None, ge=1, description="requests to /v1")


class TenantDescription(Quotas):
    """A tenant."""

    id: str
    name: str
    created_at: datetime.datetime


class ApiKey(BaseModel):
    """What may be known of a key."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="the part of the key that is no secret")
    tenant: str
    name: str
    created_at: datetime.datetime
    expires_at: datetime.datetime | None
    revoked_at: datetime.datetime | None
    last_used_at: datetime.datetime | None = Field(description="accurate to a minute")


class Usage(BaseModel):
    """How much of a quota is used; a limit that is null is none."""

    used: int
    limit: int | None


class TenantStatus(BaseModel):
    """In whose name a request was made, and what that tenant uses."""

    id: str
    name: str
    key: str | None = Field(description="id of the API key, null in open mode")
    stored_bytes: Usage = Field(
        description="uploads and results; content that two tenants have counts for both"
    )
    unfinished_jobs: Usage = Field(description="jobs that are queued or running")
    requests_per_minute: int | None = Field(description="limit of requests to /v1, null for none")
