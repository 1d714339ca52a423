"""kill -9 at each point of a job's way, of everything at once or of a worker: it still ends as it should.

The processes are real, and so are their deaths; only the moment is arranged (crash_points.py).
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from crash_points import SUBMITTING, WORKING, run_until_killed
from servers import S3_CREDENTIALS, postgresql_database, s3_bucket
from service_helpers import FAKE_WORKER, queue, wait_until

from service.jobs.schemas import Job
from service.services import Services
from service.settings import Settings
from service.worker import process

# Processes that are forked from one that has imported all they need, and has no threads.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["crash_points"])


@contextmanager
def one_machine(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """SQLite and a directory, used by one process after the other."""
    yield {"data_dir": tmp_path / "data"}


@contextmanager
def many_machines(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """PostgreSQL and S3; the leases of lost workers have to run out."""
    with postgresql_database() as url, s3_bucket() as bucket:
        yield {"data_dir": tmp_path / "data", "database_url": url, "lease_seconds": 1, **bucket}


def submit(services: Services, key: str) -> Job:
    """Upload a model and queue a job under a key: done again, it changes nothing."""
    return queue(services, script={"files": {"name": key}}, key=key)


@pytest.mark.parametrize("deployment", [one_machine, many_machines])
def test_whatever_is_killed_every_job_succeeds_once(
    deployment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "COMMAND", FAKE_WORKER)
    with deployment(tmp_path) as settings:
        settings = {**settings, "max_attempts": 99, "log_level": "error"}
        for point in (*SUBMITTING, *WORKING):
            submitting = functools.partial(submit, key=point) if point in SUBMITTING else None
            victim = SPAWN.Process(
                target=run_until_killed, args=(point, FAKE_WORKER, settings, S3_CREDENTIALS, submitting)
            )
            victim.start()
            victim.join(60)
            assert victim.exitcode == -signal.SIGKILL, point
            wait_until(lambda: not processes_of(tmp_path))

        services = Services.of(Settings(**settings))
        with services.opened():
            # Whoever got no answer asks again.
            jobs = {point: submit(services, point) for point in SUBMITTING}
            services.supervisor.start()
            wait_until(lambda: not unfinished(services))
            services.supervisor.stop()
            done = {
                job.id: job for job in services.jobs.page("default", state=None, cursor=None, limit=200).items
            }
            assert set(done) == {job.id for job in jobs.values()}
            for point, job in jobs.items():
                assert done[job.id].state == "succeeded", done[job.id]
                assert_whole(services, done[job.id], point)
            # One result each, and nothing half done.
            assert stored_results(services, done.values())
            for directory in (services.data.staging, services.data.inputs, services.data.scratch):
                assert list(directory.iterdir()) == []
        assert max(job.attempt for job in done.values()) > 1, "no worker was killed"


def unfinished(services: Services) -> list[Job]:
    jobs = services.jobs.page("default", state=None, cursor=None, limit=200).items
    return [job for job in jobs if job.state in ("queued", "running")]


def assert_whole(services: Services, job: Job, name: str) -> None:
    key, bundle = services.jobs.bundle("default", job.id)
    content = b"".join(services.store.read(key, 0, bundle.bytes))
    assert hashlib.sha256(content).hexdigest() == bundle.sha256
    key, file = services.jobs.result_file("default", job.id, "name")
    assert b"".join(services.store.read(key, 0, file.bytes)) == name.encode()


def stored_results(services: Services, jobs: Any) -> bool:
    """Whether of each job the last attempt's result is stored, and of no other attempt."""
    return all(
        services.store.exists(f"results/{job.id}/{attempt}/bundle.zip") == (attempt == job.attempt)
        for job in jobs
        for attempt in range(1, job.attempt + 1)
    )


def processes_of(directory: Path) -> list[str]:
    """Processes that name the directory in their command line: those of jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has ended just now
            continue
        if os.fsencode(directory) in command:
            found.append(path.parent.name)
    return found
