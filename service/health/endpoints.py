"""Whether the service lives, and whether it can do its work."""

from __future__ import annotations

import os
from typing import Literal

import structlog
from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from service.dependencies import InServices
from service.errors import ServiceError, ServiceErrorCode
from service.problems import problem_responses

log = structlog.get_logger()
router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.get("/live", responses=problem_responses())
def live() -> Health:
    """The process answers."""
    return Health()


@router.get("/ready", responses=problem_responses(ServiceErrorCode.NOT_READY))
def ready(services: InServices) -> Health:
    """Database, storage and workers are there."""
    try:
        services.database.check()
    except SQLAlchemyError as error:
        log.warning("database is not ready", error=str(error))
        raise ServiceError(ServiceErrorCode.NOT_READY, "The database does not answer.") from error
    if not os.access(services.data.staging, os.W_OK):
        raise ServiceError(ServiceErrorCode.NOT_READY, "The data directory cannot be written.")
    if not services.supervisor.is_alive():
        raise ServiceError(ServiceErrorCode.NOT_READY, "A worker is not running.")
    return Health()
