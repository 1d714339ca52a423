"""Whether this process can do its work: each part is asked, and none is waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from service.database import Database
from service.health.probes import Probe
from service.health.redis_servers import BROKER, RATES, RedisServers
from service.metrics.state import count_busy_workers
from service.storage.directory import DataDirectory
from service.storage.store import Store
from service.worker.runner import Runner
from service.worker.supervisor import Supervisor

log = structlog.get_logger()

_TIMEOUT_SECONDS: Final = 2.0
_WITHOUT_REDIS: Final = {
    BROKER: "The broker does not answer: jobs are accepted and wait for it.",
    RATES: "The Redis server of the rate limits does not answer: each API limits by itself.",
}


class _Part(NamedTuple):
    probe: Probe[object]
    complaint: str


class Readiness:
    """Asks database, store, data directory and the threads of this process, and what it can do without.

    Safe to use from several threads.
    """

    def __init__(
        self,
        data: DataDirectory,
        database: Database,
        store: Store,
        runner: Runner,
        supervisor: Supervisor,
        count_workers: Callable[[], int | None],
        redis_servers: RedisServers,
    ) -> None:
        self._runner = runner
        self._supervisor = supervisor
        self._redis_servers = redis_servers
        self.count_workers: Final = count_workers
        """Processes that run jobs, on all machines; None when that is not known."""
        self._busy_workers = Probe("ready-workers", lambda: count_busy_workers(database))
        self._parts = {
            name: _Part(Probe(f"ready-{name}", ask), complaint)
            for name, ask, complaint in (
                ("database", database.check, "The database does not answer."),
                ("store", store.check, "The store of files does not answer."),
                ("data directory", _writable(data), "The data directory cannot be written."),
            )
        }

    async def complaints(self) -> list[str]:
        """What keeps this process from its work, in sentences; known within some seconds."""
        found = await asyncio.gather(*(self._complaint(name) for name in self._parts))
        sentences = [sentence for sentence in found if sentence is not None]
        if self._runner.draining.is_set():
            sentences.append("The service is shutting down.")
        elif not self._supervisor.is_alive():
            sentences.append("A worker is not running.")
        return sentences

    async def busy_workers(self) -> int | None:
        """Worker processes that run jobs, on all machines; None when the database does not tell in time."""
        try:
            return await self._busy_workers.answer_async(_TIMEOUT_SECONDS)
        except Exception:
            return None

    async def warnings(self) -> list[str]:
        """What is wrong although this process does its work; another API would do no better."""
        sentences = []
        if self.count_workers() == 0:
            sentences.append("No worker is running: jobs are accepted and wait for one.")
        answers = await asyncio.gather(*map(self._answers, self._redis_servers.probes))
        for name, does_answer in zip(self._redis_servers.probes, answers, strict=True):
            if not does_answer:
                sentences.append(_WITHOUT_REDIS[name])
        return sentences

    async def _answers(self, name: str) -> bool:
        try:
            await self._redis_servers.probes[name].answer_async(_TIMEOUT_SECONDS)
        except Exception as error:
            log.warning("Redis does not answer", server=name, error=str(error) or type(error).__name__)
            return False
        return True

    async def _complaint(self, name: str) -> str | None:
        part = self._parts[name]
        try:
            await part.probe.answer_async(_TIMEOUT_SECONDS)
        except Exception as error:
            log.warning("not ready", part=name, error=str(error) or type(error).__name__)
            return part.complaint
        return None


def _writable(data: DataDirectory) -> Callable[[], None]:
    def check() -> None:
        if not os.access(data.staging, os.W_OK):
            raise PermissionError(f"{data.staging} cannot be written")

    return check
