"""Workers without the HTTP API: what `onnx-qat worker` runs."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog

from service import tracing
from service.errors import ServiceError, ServiceErrorCode
from service.logs import configure_process_logs
from service.metrics.exposition import metrics_served, registry_of
from service.services import Services
from service.settings import Settings
from service.worker.alive import kept_fresh
from service.worker.presence import Presence

log = structlog.get_logger()

_LOOK_SECONDS: Final = 0.1


def check_worker(settings: Settings) -> None:
    """Refuse settings with which no job would be run here, or with which two processes would use one SQLite.

    Raises:
        ServiceError: `setting_invalid`.
    """
    if settings.database_url is None:
        raise ServiceError(
            ServiceErrorCode.SETTING_INVALID,
            "ONNX_QAT_DATABASE_URL is not set: workers apart from the API share its PostgreSQL database. "
            "Set it for both, or let `onnx-qat serve` run the jobs.",
            field="database_url",
        )
    if settings.workers == 0:
        raise ServiceError(
            ServiceErrorCode.SETTING_INVALID,
            "ONNX_QAT_WORKERS is 0, and nothing would run; write how many jobs run at the same time.",
            field="workers",
        )


def run_workers(settings: Settings, alive_file: Path | None = None) -> int:
    """Run jobs until SIGTERM or SIGINT; the exit status.

    What runs then may finish within the grace of the settings; the rest goes back into the queue, at a
    second signal at once.

    Args:
        alive_file: touched every 5 seconds as long as the workers and their helpers run.
    """
    configure_process_logs(settings)
    tracing.configure()
    services = Services.of(settings)
    presence = Presence(services.database, settings.lease_seconds, lambda: _is_here(services))
    with services.opened(), metrics_served(settings, registry_of()), ExitStack() as started:
        services.runner.examine_isolation()
        for part in (services.worker_maintenance, services.supervisor, presence):
            part.start()
            started.callback(part.stop)
        log.info("workers started", workers=settings.workers, queue=settings.queue)
        with kept_fresh(alive_file, services.supervisor.is_alive):
            if settings.queue == "celery":
                from service.worker import messages

                app = messages.celery_app(settings)
                status = messages.run_celery_worker(app, settings, services.leases, services.runner)
            else:
                _wait_for_the_end(services)
                status = 0
    tracing.shut_down()
    return status


def _is_here(services: Services) -> bool:
    """Whether jobs are run here: by the supervisor's threads, or by Celery's."""
    return services.supervisor.is_alive() and not services.runner.draining.is_set()


def _wait_for_the_end(services: Services) -> None:
    """Return when the running jobs have finished after a signal, the grace is over, or a second one came."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    while not signals:
        time.sleep(_LOOK_SECONDS)
    deadline = time.monotonic() + services.settings.shutdown_grace_seconds
    log.info("ending; running jobs may finish", seconds=services.settings.shutdown_grace_seconds)
    while len(signals) == 1 and time.monotonic() < deadline:
        if services.supervisor.drain(_LOOK_SECONDS):
            return
