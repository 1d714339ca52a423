"""What was accepted is not lost when the service ends, gracefully or not."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from service_helpers import HERE, Server, is_running, submit, wait_for, wait_for_pid


def test_a_job_survives_the_sudden_death_of_the_service(start_server, tmp_path: Path) -> None:
    server: Server = start_server()
    with server.client() as client:
        done = submit(client, {"files": {"a": "kept"}})
        wait_for(client, done)
        running = submit(client, {"seconds": 2})
        queued = submit(client, {"files": {"a": "1"}})
        pid = wait_for_pid(client, running)
    server.stop(signal.SIGKILL)
    wait_until_gone(pid)

    server.start()
    with server.client() as client:
        for job in (running, queued):
            assert wait_for(client, job)["state"] == "succeeded"
            assert client.get(f"/v1/jobs/{job}/bundle").status_code == 200
        assert client.get(f"/v1/jobs/{done}/files/a").text == "kept"
        assert len(client.get("/v1/jobs").json()["items"]) == 3
    assert len(list((tmp_path / "data/scratch").iterdir())) == 0


def test_a_graceful_end_queues_the_running_job_again(start_server) -> None:
    server: Server = start_server(ONNX_QAT_SHUTDOWN_GRACE_SECONDS="0")
    with server.client() as client:
        job = submit(client, {"seconds": 3})
        pid = wait_for_pid(client, job)
        # Somebody follows the job; that does not hold up the end.
        with client.stream("GET", f"/v1/jobs/{job}/events"):
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) in (0, -signal.SIGTERM)
    assert not is_running(pid)
    server.start()
    with server.client() as client:
        assert wait_for(client, job)["state"] == "succeeded"


def test_a_second_service_on_the_same_data_is_refused(start_server, tmp_path: Path) -> None:
    start_server()
    second = subprocess.run(
        [sys.executable, str(HERE / "fake_server.py"), str(tmp_path / "data"), "0"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert second.returncode != 0
    assert b"Another service uses this data directory" in second.stderr


def test_logs_are_json_with_request_and_job_ids(start_server, tmp_path: Path) -> None:
    server = start_server()
    server.stop()
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_server.py"), str(tmp_path / "data"), str(server.port)],
            env={"ONNX_QAT_LOG_FORMAT": "json", "PYTHONPATH": ":".join(sys.path)},
            stderr=file,
        )
        try:
            transport = httpx.HTTPTransport(retries=10)
            with server.client(transport=transport) as client:
                job = submit(client, {"do": "segfault"}, headers={"X-Request-ID": "r1"})
                wait_for(client, job)
        finally:
            process.terminate()
            process.wait(60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line.get("request") == "r1" and line.get("status") == 202 for line in lines)
    of_the_worker = [line for line in lines if line.get("job") == job and "attempt" in line]
    assert any(line.get("code") == "worker_crashed" for line in of_the_worker)
    assert {(line["attempt"], line["request"]) for line in of_the_worker} == {(1, "r1")}
    assert all(datetime.datetime.fromisoformat(line["timestamp"]).tzinfo for line in lines)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_running(pid):
        if time.monotonic() > deadline:
            pytest.fail("the job's process outlives its service")
        time.sleep(0.02)
