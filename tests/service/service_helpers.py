"""What the tests of the service do again and again, and a service in a process that a test may kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
FAKE_WORKER = (sys.executable, str(HERE / "fake_worker.py"))

Script = dict[str, Any]


class Server:
    """A service with the fake worker in a process of its own."""

    def __init__(self, data: Path, **environment: str) -> None:
        self._data = data
        self._environment = environment
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_server.py"), str(self._data), str(self.port)],
            env={**os.environ, **self._environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the service ended at its start"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the service did not become ready")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)


def submit(client: httpx.Client, script: Script, **form: Any) -> str:
    """Submit a prepare job that runs a script of the fake worker; its id."""
    answer = client.post("/v1/prepare", files={"model": json.dumps(script)}, **form)
    assert answer.status_code == 202, answer.text
    identifier: str = answer.json()["id"]
    return identifier


def wait_for(client: httpx.Client, job: str, *states: str, seconds: float = 20) -> dict[str, Any]:
    """Wait until a job is in one of the states (without any: has ended)."""
    states = states or ("succeeded", "failed", "cancelled")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if answer["state"] in states:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"the job is still {answer}")


def wait_for_pid(client: httpx.Client, job: str) -> int:
    """Wait until the fake worker does a job; its process id."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stage = client.get(f"/v1/jobs/{job}").json()["progress"]["stage"]
        if stage is not None:
            return int(stage.removeprefix("pid "))
        time.sleep(0.05)
    raise AssertionError("the job does not start")


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is a complete RFC 9457 document with this code."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert problem["status"] == status
    assert problem["type"] == f"urn:onnx-qat:problem:{code}"
    assert problem["title"]
    assert problem["detail"]
    return problem
