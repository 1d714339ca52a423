"""The end of a process: what is under way may finish, within a grace, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from deployments import Deployment, on_postgresql, scaled
from service_helpers import Server, Workers, free_port, queue, submit, wait_for_pid, wait_until

from service.jobs.schemas import Job
from service.services import Services
from service.settings import Settings

ENDED = (0, -signal.SIGTERM)


def job_states(data: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(data / "onnx-qat.db")) as database:
        return [row[0] for row in database.execute("SELECT state FROM jobs ORDER BY number")]


def is_draining(client: httpx.Client) -> bool:
    answer = client.get("/health/ready")
    return answer.status_code == 503 and "shutting down" in answer.json()["detail"]


def test_a_running_job_finishes_and_the_service_answers_meanwhile(start_server) -> None:
    server: Server = start_server(ONNX_QAT_SHUTDOWN_GRACE_SECONDS="60")
    with server.client() as client:
        job = submit(client, {"seconds": 8})
        wait_for_pid(client, job)
        with client.stream("GET", f"/v1/jobs/{job}/events") as events:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_draining(client))
            submit(client, {"files": {"a": "accepted, to be run after the restart"}})
            told = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
        assert told[-1]["state"] == "succeeded"
    assert server.process.wait(60) in ENDED
    assert job_states(server.data) == ["succeeded", "queued"]


def test_what_takes_longer_than_the_grace_is_queued_again(start_server) -> None:
    server: Server = start_server(ONNX_QAT_SHUTDOWN_GRACE_SECONDS="1")
    with server.client() as client:
        wait_for_pid(client, submit(client, {"seconds": 600}))
    assert server.stop(signal.SIGTERM) in ENDED
    assert job_states(server.data) == ["queued"]


def test_a_second_signal_ends_at_once(start_server) -> None:
    server: Server = start_server(ONNX_QAT_SHUTDOWN_GRACE_SECONDS="600")
    with server.client() as client:
        job = submit(client, {"seconds": 600})
        wait_for_pid(client, job)
        with slow_upload(server) as upload:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_draining(client))
            with client.stream("GET", f"/v1/jobs/{job}/events"):
                assert server.stop(signal.SIGTERM) in ENDED
            assert not upload.recv(1000)
    assert job_states(server.data) == ["queued"]


@contextlib.contextmanager
def slow_upload(server: Server) -> Iterator[socket.socket]:
    """The first half of an upload, whose second is "56789", is with the service."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100"), "the service reads the body"
        connection.sendall(b"01234")
        yield connection


def test_an_upload_that_is_under_way_finishes(start_server) -> None:
    server: Server = start_server(ONNX_QAT_SHUTDOWN_GRACE_SECONDS="60")
    with slow_upload(server) as connection:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server))
        connection.sendall(b"56789")
        assert connection.recv(1000).startswith(b"HTTP/1.1 201")
    assert server.process.wait(60) in ENDED


def refuses(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_streams_of_events_come_to_an_end(start_server) -> None:
    """The reader is to go on at another process; the job is not of this one."""
    server: Server = start_server(ONNX_QAT_SHUTDOWN_GRACE_SECONDS="600", ONNX_QAT_WORKERS="0")
    with server.client() as client:
        job = submit(client, {})
        with client.stream("GET", f"/v1/jobs/{job}/events") as events:
            lines = events.iter_lines()
            assert next(lines).startswith("id: ")
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)  # an end in the midst of the answer would be an error here
        assert not [line for line in rest if '"failed"' in line]
    assert server.process.wait(60) in ENDED
    assert time.monotonic() - started < 60


@pytest.fixture(params=[on_postgresql, scaled], ids=["postgresql", "celery"])
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    with request.param() as deployment:
        yield deployment


def test_workers_end_in_the_same_way(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    for name, value in deployment.environment.items():
        monkeypatch.setenv(name, value)
    services = Services.of(Settings(data_dir=tmp_path / "data", workers=0))
    with services.opened(), contextlib.ExitStack() as stack:
        if services.settings.queue == "celery":
            services.supervisor.start()
            stack.callback(services.supervisor.stop)

        def started(seconds: int) -> Job:
            job = queue(services, seconds)
            wait_until(lambda: services.jobs.get("default", job.id).progress.stage)
            return job

        def state(job: Job) -> str:
            return services.jobs.get("default", job.id).state

        worker = Workers(
            tmp_path / "data",
            ONNX_QAT_WORKERS="2",
            ONNX_QAT_SHUTDOWN_GRACE_SECONDS="600",
            ONNX_QAT_METRICS_PORT=str(port),
        )
        stack.callback(worker.stop, signal.SIGKILL)
        goes_back = started(600)
        assert "onnx_qat_workers 2.0" in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
        finishes = started(6)
        worker.process.send_signal(signal.SIGTERM)
        assert state(finishes) == "running"
        wait_until(lambda: state(finishes) == "succeeded")
        assert state(goes_back) == "running"
        later = queue(services, 1)
        assert worker.stop(signal.SIGTERM) == 0
        assert (state(goes_back), state(later)) == ("queued", "queued")
        with psycopg.connect(deployment.database_url) as database:
            assert database.execute("SELECT sum(losses) FROM jobs").fetchone() == (0,)
