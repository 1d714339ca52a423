"""What a process of the service runs beside requests: threads that take queued jobs, and their helpers."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

import structlog

from service.jobs.leases import Leases
from service.jobs.service import JobService
from service.metrics.instruments import WORKERS
from service.settings import Settings
from service.unavailable import UNAVAILABLE
from service.worker.reaper import Reaper
from service.worker.runner import Runner

if TYPE_CHECKING:
    from service.worker.messages import Dispatcher

log = structlog.get_logger()

_IDLE_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 2.0


class Supervisor:
    """Runs queued jobs until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        jobs: JobService,
        leases: Leases,
        runner: Runner,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        """Make ready; a dispatcher means that jobs are run by Celery's workers and not by threads here."""
        WORKERS.set(settings.workers)
        self._jobs = jobs
        self._leases = leases
        self._runner = runner
        self._helpers: list[Reaper | Dispatcher] = [Reaper(leases, settings.lease_seconds)]
        if dispatcher is not None:
            self._helpers.append(dispatcher)
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}")
            for number in range(settings.workers if dispatcher is None else 0)
        ]

    def start(self) -> None:
        """Begin.

        Raises:
            IsolationUnavailableError: the settings demand more than this machine can.
        """
        if self._threads:
            self._runner.examine_isolation()
        for helper in self._helpers:
            helper.start()
        for thread in self._threads:
            thread.start()

    def drain(self, seconds: float) -> bool:
        """Take no more jobs and let those that run finish for so long; says whether they have."""
        deadline = time.monotonic() + seconds
        self._runner.draining.set()
        self._jobs.queued.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """End the running processes; their jobs go back into the queue."""
        self._runner.draining.set()
        self._runner.stopping.set()
        self._jobs.queued.set()
        for thread in self._threads:
            thread.join()
        for helper in self._helpers:
            helper.stop()

    def is_alive(self) -> bool:
        """Whether all that was started is running."""
        return all(part.is_alive() for part in (*self._helpers, *self._threads))

    def takes_jobs(self) -> bool:
        """Whether threads of this process run jobs, or are ready to."""
        return bool(self._threads) and self.is_alive() and not self._runner.draining.is_set()

    def _work(self) -> None:
        while not self._runner.draining.is_set():
            try:
                claim = self._leases.claim()
                if claim is not None:
                    self._runner.run(claim)
                    continue
                self._jobs.queued.wait(_IDLE_SECONDS)
                self._jobs.queued.clear()
            except UNAVAILABLE as error:
                log.warning("the database does not answer, trying again", error=str(error))
                self._runner.draining.wait(_RETRY_SECONDS)
            except Exception:
                log.exception("worker failed, going on")
                self._runner.draining.wait(_RETRY_SECONDS)
