"""Whether the service lives, and whether it can do its work."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.dependencies import InServices
from service.errors import ServiceError, ServiceErrorCode
from service.problems import problem_responses
from service.worker.isolation import Isolation

router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(Health):
    isolation: Isolation | None = Field(
        description="which protections from jobs are active on this machine; null: none run on it"
    )
    workers: int | None = Field(
        description="processes that run jobs or wait for one, on all machines, by their signs of life; null: "
        "not known, as in an API's first seconds"
    )
    busy_workers: int | None = Field(description="those that run jobs now, on all machines; null: not known")
    warnings: list[str] = Field(
        description="what is wrong although this API does its work, in sentences: without workers or the "
        "broker it accepts jobs, which wait"
    )


# Both without a thread of those that requests have, which may all be waiting for the database.


@router.head("/live", include_in_schema=False)
@router.get("/live", responses=problem_responses(public=True))
async def live() -> Health:
    """The process answers. Asks nothing else, so that nothing else has it restarted."""
    return Health()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=problem_responses(ServiceErrorCode.NOT_READY, public=True))
async def ready(services: InServices) -> Ready:
    """Database and store are there, and what runs in this process. Answers within some seconds even where one
    of them hangs.

    Without workers, or without the broker, an API is ready nevertheless: it accepts jobs, which are not lost,
    and hands out results. `warnings` says so.
    """
    complaints = await services.readiness.complaints()
    if complaints:
        raise ServiceError(ServiceErrorCode.NOT_READY, " ".join(complaints))
    warnings, busy_workers = await asyncio.gather(
        services.readiness.warnings(), services.readiness.busy_workers()
    )
    return Ready(
        isolation=services.runner.isolation,
        workers=services.readiness.count_workers(),
        busy_workers=busy_workers,
        warnings=warnings,
    )
