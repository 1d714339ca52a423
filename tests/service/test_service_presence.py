"""An API knows how many processes run jobs, by signs of life that need no clocks, and says when none does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from servers import postgresql_database
from service_helpers import Server, Workers, wait_until

from service.database import Database
from service.worker import repository
from service.worker.presence import Lookout, Presence

LEASE = 30.0
STEP = LEASE / 6


@pytest.fixture
def database_url() -> Iterator[str]:
    with postgresql_database() as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


def beat(database: Database, *workers: str) -> None:
    for worker in workers:
        with database.writing() as session:
            repository.beat(session, worker)


def known(database: Database) -> set[str]:
    with database.reading() as session:
        return {row.id for row in repository.workers(session)}


def test_workers_that_beat_are_counted_and_silent_ones_are_not(database: Database) -> None:
    lookout = Lookout(database, LEASE)
    for number in range(20):
        beat(database, "a")
        if number < 5:
            beat(database, "b")
        lookout.look(number * STEP)
        # As long as it cannot have seen each of them it says nothing.
        assert lookout.count() == (None if number < 3 else 2 if number < 10 else 1)
    assert known(database) == {"a"}


def test_what_a_dead_worker_left_is_not_counted(database: Database) -> None:
    """It was killed before this API began to watch."""
    beat(database, "dead")
    lookout = Lookout(database, LEASE)
    for number in range(7):
        lookout.look(number * STEP)
        assert lookout.count() == (None if number < 3 else 0)
    assert known(database) == set()


def test_time_in_which_nobody_could_look_is_no_silence_of_workers(database: Database) -> None:
    lookout = Lookout(database, LEASE)
    for number in range(6):
        beat(database, "a")
        lookout.look(number * STEP)
    lookout.look(1_000_000)
    assert lookout.count() == 1


def test_a_worker_that_was_thought_dead_is_counted_when_it_is_back(database: Database) -> None:
    lookout = Lookout(database, LEASE)
    beat(database, "a")
    for number in range(10):
        lookout.look(number * STEP)
    assert (lookout.count(), known(database)) == (0, set())
    beat(database, "a")
    lookout.look(10 * STEP)
    assert lookout.count() == 1


def test_a_process_is_present_as_long_as_it_takes_jobs(database: Database) -> None:
    takes_jobs = threading.Event()
    takes_jobs.set()
    presence = Presence(database, 0.06, takes_jobs.is_set)
    presence.start()
    wait_until(lambda: len(known(database)) == 1)
    takes_jobs.clear()
    wait_until(lambda: not known(database))
    takes_jobs.set()
    wait_until(lambda: len(known(database)) == 1)
    presence.stop()
    assert not known(database)


# In processes of their own.


def test_an_api_says_how_many_workers_there_are_and_when_there_is_none(
    database_url: str, tmp_path: Path
) -> None:
    environment = {"ONNX_QAT_DATABASE_URL": database_url, "ONNX_QAT_LEASE_SECONDS": "4"}
    workers = [Workers(tmp_path / "data", **environment) for _ in range(2)]
    server = Server(tmp_path / "data", ONNX_QAT_WORKERS="0", **environment)
    try:
        with server.client() as client:

            def told() -> tuple[int, list[str]]:
                answer = client.get("/health/ready")
                # It accepts jobs all the same, and they are not lost.
                assert answer.status_code == 200
                body = answer.json()
                return body["workers"], body["warnings"]

            wait_until(lambda: told() == (2, []))
            assert workers[0].stop() == 0
            workers[1].stop(signal.SIGKILL)
            none = "No worker is running: jobs are accepted and wait for one."
            wait_until(lambda: told() == (0, [none]))
            assert "onnx_qat_worker_processes 0.0" in client.get("/metrics").text
    finally:
        for process in (server, *workers):
            process.stop(signal.SIGKILL)


def test_an_api_that_runs_jobs_itself_counts(start_client, client: TestClient, database_url: str) -> None:
    assert client.get("/health/ready").json()["workers"] == 1
    beside = start_client(database_url=database_url, lease_seconds=1)
    wait_until(lambda: beside.get("/health/ready").json()["workers"] == 1)
    assert "onnx_qat_worker_processes 1.0" in beside.get("/metrics").text


def test_an_api_without_workers_says_so(start_client) -> None:
    answer = start_client(workers=0).get("/health/ready").json()
    assert (answer["workers"], len(answer["warnings"])) == (0, 1)
