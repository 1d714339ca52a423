"""Gauges of what is queued, running and stored: read from the database when somebody looks.

Every API process says the same; take the maximum over them, not the sum.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from service.database import Database, now
from service.health.probes import Probe
from service.health.redis_servers import RedisServers
from service.jobs import repository as jobs
from service.jobs.states import UNFINISHED, JobState
from service.storage.directory import DataDirectory
from service.uploads import repository as uploads

log = structlog.get_logger()

_TIMEOUT_SECONDS: Final = 2.0
_FRESH_SECONDS: Final = 1.0
# A sum over all content, which takes long where there is much.
_STORED_FRESH_SECONDS: Final = 60.0


class Queue(NamedTuple):
    """Unfinished jobs."""

    counts: dict[JobState, int]
    oldest_seconds: float
    """Since the submission of the oldest queued job; 0 when none is queued."""
    busy_workers: int
    """Worker processes that run jobs, on all machines."""


def read_queue(database: Database) -> Queue:
    """Count the unfinished jobs."""
    with database.reading() as session:
        counts = jobs.count_unfinished(session)
        oldest = jobs.oldest_queued_at(session)
        busy_workers = _busy_workers(session)
    return Queue(
        counts={state: counts.get(state, 0) for state in UNFINISHED},
        oldest_seconds=0.0 if oldest is None else max(0.0, (now() - oldest).total_seconds()),
        busy_workers=busy_workers,
    )


def count_busy_workers(database: Database) -> int:
    """Worker processes that run jobs, on all machines."""
    with database.reading() as session:
        return _busy_workers(session)


def _busy_workers(session: Session) -> int:
    return len({worker.rpartition(":")[0] for worker in jobs.busy_workers(session)})


class StateCollector(Collector):
    """Collects the gauges; without those that the database does not tell in time."""

    def __init__(
        self,
        database: Database,
        data: DataDirectory,
        count_workers: Callable[[], int | None],
        redis_servers: RedisServers,
    ) -> None:
        self._data = data
        self._count_workers = count_workers
        self._redis_servers = redis_servers
        self._queue = Probe("metrics", lambda: read_queue(database), fresh_seconds=_FRESH_SECONDS)
        self._stored = Probe(
            "metrics-stored", lambda: _stored_bytes(database), fresh_seconds=_STORED_FRESH_SECONDS
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily("onnx_qat_database_up", "Whether the database answers")
        try:
            queue = self._queue.answer(_TIMEOUT_SECONDS)
            stored = self._stored.answer(_TIMEOUT_SECONDS)
        except Exception as error:
            log.warning("metrics without the database", error=str(error) or type(error).__name__)
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
            yield from _queue_metrics(queue)
            yield _stored_metric(stored)
            workers = self._count_workers()
            if workers is not None:
                yield GaugeMetricFamily(
                    "onnx_qat_worker_processes",
                    "Processes that run jobs or wait for one, on all machines",
                    value=workers,
                )
        yield up
        yield from self._redis_metrics()
        yield from self._disk_metrics()

    def _redis_metrics(self) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily("onnx_qat_redis_up", "Whether a Redis server answers", labels=["use"])
        for name, probe in self._redis_servers.probes.items():
            try:
                probe.answer(_TIMEOUT_SECONDS)
                up.add_metric([name], 1)
            except Exception as error:
                log.warning("Redis does not answer", server=name, error=str(error) or type(error).__name__)
                up.add_metric([name], 0)
        yield up

    def _disk_metrics(self) -> Iterator[GaugeMetricFamily]:
        try:
            free = shutil.disk_usage(self._data.root).free
        except OSError:
            return
        yield GaugeMetricFamily(
            "onnx_qat_data_directory_free_bytes", "Free space where the data directory is", value=free
        )


def _queue_metrics(queue: Queue) -> Iterator[GaugeMetricFamily]:
    jobs_by_state = GaugeMetricFamily("onnx_qat_jobs", "Unfinished jobs by their state", labels=["state"])
    for state, count in queue.counts.items():
        jobs_by_state.add_metric([state.value], count)
    yield jobs_by_state
    yield GaugeMetricFamily(
        "onnx_qat_oldest_queued_job_seconds",
        "Time since the oldest queued job was submitted; 0 when none is queued",
        value=queue.oldest_seconds,
    )
    yield GaugeMetricFamily(
        "onnx_qat_busy_workers", "Worker processes that run jobs, on all machines", value=queue.busy_workers
    )


def _stored_metric(stored: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily("onnx_qat_stored_bytes", "Bytes in the store", labels=["content"])
    for content, size in stored.items():
        family.add_metric([content], size)
    return family


def _stored_bytes(database: Database) -> dict[str, int]:
    with database.reading() as session:
        return {"uploads": uploads.stored_bytes(session), "results": jobs.result_bytes(session)}
