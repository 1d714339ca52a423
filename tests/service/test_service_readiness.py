"""Readiness says which part is missing, and soon, even where one hangs; liveness asks nothing of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio.to_thread
import pytest
from fastapi.testclient import TestClient
from service_helpers import assert_problem, submit, wait_for_pid, wait_until
from sqlalchemy.exc import OperationalError

from service.database import Database
from service.health import readiness
from service.health.probes import Probe
from service.storage.store import StoreUnavailableError


@pytest.fixture
def hanging_database(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """While the test lasts the database gives no answer. The semaphore counts who has asked it."""
    monkeypatch.setattr(readiness, "_TIMEOUT_SECONDS", 3)
    asked, answers = threading.Semaphore(0), threading.Event()

    def hang(self: Database) -> Any:
        asked.release()
        answers.wait()
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(Database, "reading", hang)
    yield asked
    answers.set()


def test_every_part_that_is_missing_is_named(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    staging = client.app.state.services.data.staging  # type: ignore[attr-defined]
    monkeypatch.setattr("os.access", lambda path, mode: path == staging)
    detail = assert_problem(client.get("/health/ready"), 503, "not_ready")["detail"]
    assert detail == "The store of files does not answer."
    monkeypatch.setattr(Database, "reading", refuse)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    detail = assert_problem(client.get("/health/ready"), 503, "not_ready")["detail"]
    for part in ("database", "store", "data directory"):
        assert part in detail
    monkeypatch.undo()
    assert client.get("/health/ready").status_code == 200


def test_a_database_that_hangs_is_said_to_be_missing_soon(
    client: TestClient, hanging_database: threading.Semaphore
) -> None:
    started = time.monotonic()
    detail = assert_problem(client.get("/health/ready"), 503, "not_ready")["detail"]
    assert detail == "The database does not answer."
    assert time.monotonic() - started < 20


def test_health_is_told_while_every_thread_waits_for_the_database(
    client: TestClient, hanging_database: threading.Semaphore
) -> None:
    threads = [threading.Thread(target=client.get, args=("/v1/jobs",)) for _ in range(50)]
    for thread in threads:
        thread.start()
    limit = anyio.run(_threads)
    for _ in range(int(limit)):
        assert hanging_database.acquire(timeout=60), "the threads are not all waiting"
    assert client.get("/health/live").status_code == 200
    assert_problem(client.get("/health/ready"), 503, "not_ready")
    assert all(thread.is_alive() for thread in threads)


async def _threads() -> float:
    """How many threads there are for requests."""
    return anyio.to_thread.current_default_thread_limiter().total_tokens


def test_liveness_asks_nobody(client: TestClient, hanging_database: threading.Semaphore) -> None:
    while hanging_database.acquire(blocking=False):
        pass
    assert client.get("/health/live").json() == {"status": "ok"}


def test_workers_that_are_busy_are_reported(client: TestClient) -> None:
    assert client.get("/health/ready").json()["busy_workers"] == 0
    job = submit(client, {"seconds": 600})
    wait_for_pid(client, job)
    assert client.get("/health/ready").json()["busy_workers"] == 1
    client.post(f"/v1/jobs/{job}/cancel")
    wait_until(lambda: client.get("/health/ready").json()["busy_workers"] == 0)


def test_a_service_that_is_shutting_down_is_not_ready(client: TestClient) -> None:
    client.app.state.services.supervisor.drain(10)  # type: ignore[attr-defined]
    detail = assert_problem(client.get("/health/ready"), 503, "not_ready")["detail"]
    assert detail == "The service is shutting down."


def test_a_probe_asks_once_at_a_time_however_many_wait() -> None:
    asked, answers = threading.Semaphore(0), threading.Event()

    def ask() -> str:
        asked.release()
        answers.wait()
        return "here"

    probe = Probe("test", ask)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            probe.answer(0.01)
    assert asked.acquire(timeout=60)
    assert not asked.acquire(blocking=False)
    answers.set()
    assert probe.answer(60) == "here"


@pytest.mark.parametrize(("fresh_seconds", "times"), [(600, 1), (0, 3)])
def test_a_probes_answer_is_good_for_its_time(fresh_seconds: float, times: int) -> None:
    asked: list[None] = []
    probe = Probe("test", lambda: asked.append(None), fresh_seconds=fresh_seconds)
    for _ in range(3):
        probe.answer(60)
    assert len(asked) == times


def test_a_probe_passes_errors_on() -> None:
    def fail() -> None:
        raise StoreUnavailableError("gone")

    probe = Probe("test", fail)
    with pytest.raises(StoreUnavailableError, match="gone"):
        probe.answer(60)
