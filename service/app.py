"""The application: its parts put together."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from rewriter import Recipe
from service.database import Database
from service.dependencies import Services
from service.health import endpoints as health
from service.jobs import endpoints as jobs
from service.jobs.service import JobService
from service.logs import RequestLog, configure_logs
from service.problems import Problem, install_error_handlers
from service.settings import Settings
from service.storage import DataDirectory
from service.uploads import endpoints as uploads
from service.uploads.service import UploadService
from service.worker.supervisor import Supervisor


def create_app(settings: Settings) -> FastAPI:
    """The service with its embedded workers, which run while the application's lifespan does."""
    services = _services(settings)
    app = FastAPI(
        title="ONNX quantization-aware training",
        summary="Float ONNX models in, trainable bundles and int8 models out.",
        version=importlib.metadata.version("onnx-qat"),
        lifespan=_lifespan,
    )
    app.state.services = services
    app.add_middleware(RequestLog)
    install_error_handlers(app)
    for router in (uploads.router, jobs.prepare_router, jobs.router, health.router):
        app.include_router(router)
    _document_shared_schemas(app)
    return app


def _services(settings: Settings) -> Services:
    data = DataDirectory(settings.data_dir)
    database = Database(data.database)
    upload_service = UploadService(database, data)
    job_service = JobService(database, data, upload_service)
    supervisor = Supervisor(settings, data, upload_service, job_service)
    return Services(settings, data, database, upload_service, job_service, supervisor)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    configure_logs(services.settings)
    with services.data.locked():
        services.data.create()
        services.database.create_tables()
        services.supervisor.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(services.supervisor.stop)
            services.database.close()


def _document_shared_schemas(app: FastAPI) -> None:
    """Add the schemas that descriptions refer to by name: of problems, and of the recipe in a form."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, shared = models_json_schema(
                [(Problem, "serialization"), (Recipe, "validation")],
                ref_template="#/components/schemas/{model}",
            )
            for name, schema in shared["$defs"].items():
                document["components"]["schemas"].setdefault(name, schema)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
