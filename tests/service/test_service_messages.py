"""Celery's messages: losing or repeating them does no harm, and jobs are accepted without a broker too."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from servers import RedisServer, postgresql_database
from service_helpers import Workers, queue, submit, wait_for, wait_for_pid, wait_until

from service.services import Services
from service.settings import Settings
from service.worker.command import run_workers
from service.worker.messages import Dispatcher, celery_app


@pytest.fixture
def database_url() -> Iterator[str]:
    with postgresql_database() as url:
        yield url


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def test_celery_without_its_servers_is_refused_at_the_start() -> None:
    for given in ({}, {"broker_url": "redis://127.0.0.1/0"}, {"database_url": "postgresql://127.0.0.1/x"}):
        with pytest.raises(ValidationError, match="ONNX_QAT_BROKER_URL and ONNX_QAT_DATABASE_URL"):
            Settings(queue="celery", **given)  # type: ignore[arg-type]


def test_there_is_a_message_for_every_queued_job_even_after_all_were_lost(
    database_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = Settings(
        data_dir=tmp_path, database_url=database_url, queue="celery", broker_url=redis_server.url
    )
    services = Services.of(settings)
    with services.opened():
        dispatcher = Dispatcher(celery_app(settings), services.leases, services.jobs.queued)
        assert dispatcher.send_missing() == 0
        for number in range(3):
            queue(services, number)
        assert dispatcher.send_missing() == 3
        assert dispatcher.send_missing() == 0
        queue(services, 3)
        assert dispatcher.send_missing() == 1
        redis_server.stop()
        started = time.monotonic()
        with pytest.raises(OperationalError):
            dispatcher.send_missing()
        assert time.monotonic() - started < 30
        redis_server.start()
        assert dispatcher.send_missing() == 4


def test_jobs_are_accepted_while_the_broker_is_down_and_run_when_it_is_back(
    start_client, database_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    environment = {
        "ONNX_QAT_DATABASE_URL": database_url,
        "ONNX_QAT_QUEUE": "celery",
        "ONNX_QAT_BROKER_URL": redis_server.url,
        "ONNX_QAT_SHUTDOWN_GRACE_SECONDS": "0",
    }
    client = start_client(database_url=database_url, queue="celery", broker_url=redis_server.url)
    with contextlib.ExitStack() as stack:
        worker = Workers(tmp_path / "data", **environment)
        stack.callback(worker.stop, signal.SIGKILL)
        assert wait_for(client, submit(client, {"files": {"a": "before"}}))["state"] == "succeeded"
        assert 'onnx_qat_redis_up{use="broker"} 1.0' in client.get("/metrics").text
        redis_server.stop()
        down = submit(client, {"files": {"a": "down"}})
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert "The broker does not answer: jobs are accepted and wait for it." in ready.json()["warnings"]
        wait_until(lambda: 'onnx_qat_redis_up{use="broker"} 0.0' in client.get("/metrics").text)
        redis_server.start()
        assert wait_for(client, down)["state"] == "succeeded"

        running = submit(client, {"seconds": 600})
        wait_for_pid(client, running)
        assert worker.stop(signal.SIGTERM) == 0
        job = client.get(f"/v1/jobs/{running}").json()
        assert (job["state"], job["failure"]) == ("queued", None)
        assert client.post(f"/v1/jobs/{running}/cancel").status_code == 200
    wait_until(lambda: not list((tmp_path / "data/scratch").iterdir()))


def test_a_worker_whose_celery_fails_ends_with_a_status_that_says_so(
    database_url: str, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailedWorker:
        exitcode = 70

        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None: ...

    monkeypatch.setattr("service.worker.command.configure_process_logs", lambda settings: None)
    monkeypatch.setattr("celery.Celery.Worker", FailedWorker)
    settings = Settings(
        data_dir=tmp_path, database_url=database_url, queue="celery", broker_url=redis_server.url
    )
    assert run_workers(settings) == 70


def test_a_worker_that_fails_leaves_no_thread_that_keeps_its_process(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.command.configure_process_logs", lambda settings: None)
    monkeypatch.setattr("service.worker.messages.run_celery_worker", lambda *_: 1 / 0)
    before = set(threading.enumerate())
    settings = Settings(
        data_dir=tmp_path, database_url=database_url, queue="celery", broker_url="redis://127.0.0.1:9/0"
    )
    with pytest.raises(ZeroDivisionError):
        run_workers(settings)
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
