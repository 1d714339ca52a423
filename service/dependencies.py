"""What endpoints are given: the parts of the running application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.database import Database
from service.jobs.service import JobService
from service.settings import Settings
from service.storage import DataDirectory
from service.uploads.service import UploadService
from service.worker.supervisor import Supervisor


@dataclass(frozen=True)
class Services:
    """One of each, made by `create_app` and shared by all requests."""

    settings: Settings
    data: DataDirectory
    database: Database
    uploads: UploadService
    jobs: JobService
    supervisor: Supervisor


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


InServices = Annotated[Services, Depends(_services)]
