"""What the tests of the service do again and again, and a service in a process that a test may kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from service.jobs.schemas import Job, PrepareRequest
from service.openapi import render
from service.services import Services
from service.uploads.kinds import UploadKind
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile

HERE = Path(__file__).parent
FAKE_WORKER = (sys.executable, str(HERE / "fake_worker.py"))
UNCONFINED_WORKER = (*FAKE_WORKER, "--unconfined")
"""What a hostile process could do where the kernel offers no protection."""

Script = dict[str, Any]

DOCUMENTED: dict[str, dict[str, int]] = {
    f"{method.upper()} {path}": {
        code: int(status)
        for status, answer in operation["responses"].items()
        if status >= "400"
        for code in re.findall(r"`(\w+)`", answer["description"])
    }
    for path, operations in json.loads(render())["paths"].items()
    for method, operation in operations.items()
}
"""The error codes, and their statuses, that the OpenAPI document names for each operation."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the service that the process runs is ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended at its start"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the service did not become ready")


class Server:
    """A service with the fake worker in a process of its own."""

    def __init__(self, data: Path, log: Path | None = None, **environment: str) -> None:
        self.data = data
        self._log = log
        self._environment = environment
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        with open(self._log or os.devnull, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "fake_server.py"), str(self.data), str(self.port)],
                env={**os.environ, **self._environment},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        wait_until_ready(self.url, self.process)

    def client(self, **options: Any) -> httpx.Client:
        """More patient than httpx is: on a busy machine an answer may take long."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


class Workers:
    """`onnx-qat worker` with the fake worker, in a process of its own."""

    def __init__(self, data: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_workers.py"), str(data)],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.02)


def queue(
    services: Services, number: int = 0, *, script: Script | None = None, key: str | None = None
) -> Job:
    """Queue a job that takes so many seconds, or that runs a script of the fake worker."""
    content = json.dumps(script or {"seconds": number}).encode()
    with services.data.staged() as directory:
        (directory / "models").mkdir()
        (directory / "models/model.onnx").write_bytes(content)
        file = StoredFile(name="model.onnx", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        received = Received(directory, {UploadKind.MODEL: [file]})
        model = services.uploads.store("default", received, UploadKind.MODEL)[0]
    return services.jobs.submit("default", PrepareRequest(kind="prepare", model=model.id), key)


def submit(client: httpx.Client, script: Script, **form: Any) -> str:
    """Submit a prepare job that runs a script of the fake worker; its id."""
    answer = client.post("/v1/prepare", files={"model": json.dumps(script)}, **form)
    assert answer.status_code == 202, answer.text
    identifier: str = answer.json()["id"]
    return identifier


def wait_for(client: httpx.Client, job: str, *states: str, seconds: float = 60) -> dict[str, Any]:
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
    deadline = time.monotonic() + 60
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


def assert_documented(answer: httpx.Response) -> None:
    """An error of one of the API's operations is one that the OpenAPI document names for it."""
    if not answer.is_error:
        return
    for operation, codes in DOCUMENTED.items():
        method, path = operation.split(" ")
        if method == answer.request.method and re.fullmatch(
            re.sub(r"\{\w+\}", "[^/]+", path), answer.request.url.path
        ):
            if method == "HEAD":  # no body, which alone has the code
                assert answer.status_code in codes.values()
                continue
            answer.read()
            code = answer.json()["code"]
            assert codes.get(code) == answer.status_code, f"{operation} does not document {code}"


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
