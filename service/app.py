"""The application: its parts put together."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio.to_thread
import structlog
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.middleware.exceptions import ExceptionMiddleware

from rewriter import Recipe
from service import tracing
from service.access.browsers import BrowserGuard
from service.access.middleware import Access
from service.health import endpoints as health
from service.jobs import endpoints as jobs
from service.logs import RequestLog, configure_logs
from service.metrics import endpoints as metrics
from service.metrics.exposition import metrics_served
from service.metrics.requests import RequestMetrics
from service.openapi_examples import add_examples
from service.page import endpoints as page
from service.problems import Problem, install_error_handlers
from service.resumable import endpoints as resumable
from service.retention import endpoints as retention
from service.services import Services
from service.settings import AuthMode, Settings
from service.tenants import endpoints as tenants
from service.uploads import endpoints as uploads
from service.uploads.assembling import Assembly
from service.webhooks import endpoints as webhooks
from service.worker.presence import Presence

log = structlog.get_logger()


class _Part(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...


def create_app(settings: Settings) -> FastAPI:
    """The service with its embedded workers, which run while the application's lifespan does."""
    tracing.configure()
    app = FastAPI(
        title="ONNX quantization-aware training",
        summary="Float ONNX models in, trainable bundles and int8 models out.",
        version=importlib.metadata.version("onnx-qat"),
        lifespan=_lifespan,
        redirect_slashes=False,  # a path is one of the document's, or not found
        telemetry=tracing.of_requests(),
    )
    app.state.services = Services.of(settings)
    install_error_handlers(app)
    _add_middleware(app, app.state.services)
    for router in (
        uploads.router,
        resumable.router,
        jobs.prepare_router,
        jobs.router,
        retention.router,
        webhooks.router,
        tenants.router,
        health.router,
        metrics.router,
        page.router,
    ):
        app.include_router(router)
    app.webhooks.include_router(webhooks.events)
    _complete_document(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    configure_logs(services.settings)
    with services.opened(), metrics_served(services.settings, services.metrics):
        _tell_who_may_use_it(services)
        services.removal.adopt_policy()
        threads: list[_Part] = [services.supervisor, services.sender, services.maintenance]
        if not services.database.is_sqlite:  # which serves this process alone
            lease_seconds = services.settings.lease_seconds
            threads += [
                Presence(services.database, lease_seconds, services.supervisor.takes_jobs),
                services.lookout,
            ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                await anyio.to_thread.run_sync(thread.stop)
            await anyio.to_thread.run_sync(tracing.shut_down)


def _add_middleware(app: FastAPI, services: Services) -> None:
    """From the inside out, as Starlette has it."""
    app.add_middleware(Access, services=services)
    if services.settings.auth is not AuthMode.KEYS:
        app.add_middleware(BrowserGuard, allowed_hosts=services.settings.allowed_hosts)
    # What middleware refuses is answered like what endpoints refuse. The rest is left to Starlette.
    handlers = {cause: handle for cause, handle in app.exception_handlers.items() if cause is not Exception}
    app.add_middleware(ExceptionMiddleware, handlers=handlers)
    app.add_middleware(RequestMetrics)
    app.add_middleware(RequestLog)


def _tell_who_may_use_it(services: Services) -> None:
    if services.settings.auth is not AuthMode.KEYS:
        log.info("open: whoever reaches the service may use it")
    elif not services.tenants.has_usable_key():
        log.warning("there is no API key that could be used: make one with `onnx-qat keys create`")


def _complete_document(app: FastAPI) -> None:
    """Add examples, and the schemas that are referred to by name."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, shared = models_json_schema(
                [(Problem, "serialization"), (Recipe, "validation"), (Assembly, "validation")],
                ref_template="#/components/schemas/{model}",
            )
            for name, schema in shared["$defs"].items():
                document["components"]["schemas"].setdefault(name, schema)
            _leave_null_out_of_parameters(document)
            add_examples(document)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def _leave_null_out_of_parameters(document: dict[str, Any]) -> None:
    """What is not sent in a header or a query is absent; neither can carry a null."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                schema = parameter["schema"]
                kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
                if len(kinds) == 1:
                    del schema["anyOf"]
                    schema.update(kinds[0])
