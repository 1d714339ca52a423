"""A job's process may do anything: the job fails with its code, the service goes on."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_helpers import UNCONFINED_WORKER, Script, is_running, submit, wait_for, wait_for_pid, wait_until

from service.worker import landlock, process


def assert_serves(client: TestClient) -> None:
    """The service still does its work."""
    job = submit(client, {"files": {"after": "1"}})
    assert wait_for(client, job)["state"] == "succeeded"
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("settings", "script", "code", "in_detail"),
    [
        ({}, {"do": "segfault"}, "worker_crashed", "SIGSEGV"),
        ({}, {"do": "exit"}, "worker_crashed", "exit status 3"),
        ({}, {"do": "bad_alloc"}, "worker_out_of_memory", "memory"),
        ({}, {"do": "raise"}, "internal_error", "log"),
        ({}, {"do": "no_room", "errno": errno.EFBIG}, "worker_output_too_large", "file"),
        ({}, {"do": "no_room", "errno": errno.ENOSPC}, "storage_full", "disk"),
        ({}, {"do": "no_memory"}, "worker_out_of_memory", "memory"),
        (
            {"job_memory_bytes": 4 << 30},
            {"do": "allocate", "bytes": 8 << 30},
            "worker_out_of_memory",
            "memory",
        ),
        ({"job_timeout_seconds": 6}, {"do": "flood"}, "worker_timeout", "longer"),
        ({}, {"do": "hang_up"}, "worker_crashed", "exit status 1"),
        ({"job_cpu_seconds": 5}, {"do": "burn"}, "worker_timeout", "CPU"),
        (
            {"job_file_bytes": 1 << 20},
            {"do": "write_large", "bytes": 2 << 20},
            "worker_output_too_large",
            "file",
        ),
    ],
)
def test_what_ends_the_process_is_the_failure_of_the_job(
    start_client, tmp_path: Path, settings: dict[str, Any], script: Script, code: str, in_detail: str
) -> None:
    client = start_client(**settings)
    job = submit(client, script)
    failure = wait_for(client, job)["failure"]
    assert failure["code"] == code
    assert in_detail in failure["detail"]
    assert "secret" not in failure["detail"]
    assert not (tmp_path / "data/results" / job).exists()
    assert_serves(client)
    assert list((tmp_path / "data/scratch").iterdir()) == []


def test_a_killed_process_is_a_crash(client: TestClient) -> None:
    job = submit(client, {"seconds": 600})
    os.kill(wait_for_pid(client, job), signal.SIGKILL)
    failure = wait_for(client, job)["failure"]
    assert failure["code"] == "worker_crashed"
    assert "SIGKILL" in failure["detail"]
    assert_serves(client)


@pytest.mark.skipif(landlock.version() < 1, reason="this kernel has no Landlock; the service warns of that")
def test_the_process_cannot_write_outside_its_directory(client: TestClient, tmp_path: Path) -> None:
    target = tmp_path / "data" / "outside"
    job = submit(client, {"do": "write_outside", "path": str(target)})
    assert wait_for(client, job)["failure"]["code"] == "internal_error"
    assert not target.exists()


def test_the_process_cannot_have_another_file_served_as_its_result(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "COMMAND", UNCONFINED_WORKER)
    job = submit(client, {"do": "link", "path": str(tmp_path / "data/onnx-qat.db")})
    assert wait_for(client, job)["failure"]["code"] == "internal_error"
    assert not (tmp_path / "data/results" / job).exists()


def test_the_process_sees_no_secret_of_the_service(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNX_QAT_SECRET", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    job = submit(client, {})
    wait_for(client, job)
    seen = client.get(f"/v1/jobs/{job}/files/seen.json").json()
    assert not [name for name in seen["environment"] if "SECRET" in name]
    assert Path(seen["directory"]).parent == tmp_path / "data/scratch"


def test_what_the_process_started_ends_with_it(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMMAND", UNCONFINED_WORKER)
    job = submit(client, {"do": "spawn"})
    assert wait_for(client, job)["state"] == "succeeded"
    pid = int(client.get(f"/v1/jobs/{job}/files/pid").text)
    wait_until(lambda: not is_running(pid))  # killed with the group; the kernel takes a moment for it


def test_nonsense_in_the_reports_does_no_harm(client: TestClient) -> None:
    job = submit(client, {"do": "babble"})
    assert wait_for(client, job)["state"] == "succeeded"
    assert_serves(client)


def test_what_an_attempt_left_behind_is_not_served(client: TestClient, tmp_path: Path) -> None:
    blocking = submit(client, {"seconds": 600})
    job = submit(client, {})
    left = tmp_path / "data/results" / job / "0/files"
    left.mkdir(parents=True)
    (left / "manifest.json").write_text("of a service that died before it could say that the job succeeded")
    client.post(f"/v1/jobs/{blocking}/cancel")
    assert wait_for(client, job)["state"] == "succeeded"
    assert client.get(f"/v1/jobs/{job}/files/manifest.json").text == "{}"


def test_several_workers_run_several_jobs(start_client) -> None:
    client = start_client(workers=2)
    jobs = [submit(client, {"seconds": 600, "files": {"a": str(number)}}) for number in range(2)]
    assert len({wait_for_pid(client, job) for job in jobs}) == 2
    for job in jobs:
        client.post(f"/v1/jobs/{job}/cancel")
