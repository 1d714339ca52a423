"""The scaled form of compose.yaml: its processes, with the commands and the environment that it gives them.

That takes no container engine: names of hosts, ports and directories are replaced, and so are PostgreSQL
(by the tests' own) and the S3 store (by moto's, which does not check signatures). The APIs, the worker,
Redis, the proxy with its configuration and all that runs once are as in compose.yaml and in the Dockerfile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import compose
import dockerfile
import httpx
import numpy as np
import onnx
import pytest
from compose import REPOSITORY, SECRETS
from moto.server import ThreadedMotoServer
from servers import absent, postgresql_database
from service_helpers import free_port, wait_for, wait_until

PROXY = f"http://127.0.0.1:{free_port()}"
SERVICES = compose.services({**SECRETS, "QAT_PUBLIC_URL": PROXY})
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@dataclass
class Stack:
    """The processes, in a directory of their own."""

    directory: Path
    places: dict[str, str]
    """What compose.yaml names, and what is here in its place."""
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    key: str = ""

    def prepared(self, service: str, port: int = 8000) -> tuple[list[str], dict[str, str]]:
        """Command and environment of a service."""
        told = SERVICES[service]
        built = "build" in told
        command = [*told.get("entrypoint", []), *told.get("command", dockerfile.COMMAND if built else [])]
        environment = {**(dockerfile.ENVIRONMENT if built else {}), **told.get("environment", {})}
        command, environment = json.loads(self.replaced(service, port, json.dumps([command, environment])))
        return command, {"PATH": PATH, "PYTHONPATH": str(REPOSITORY), **environment}

    def replaced(self, service: str, port: int, text: str) -> str:
        places = {**self.places, '"/data"': json.dumps(f"{self.directory}/{service}"), "8000": str(port)}
        for there, here in places.items():
            text = text.replace(there, here)
        return text

    def start(self, service: str, number: int = 1) -> None:
        """Start a process, the first replica or another one."""
        name = f"{service}-{number}"
        command, environment = self.prepared(service, self.ports.get(name, 8000))
        self.processes[name] = subprocess.Popen(command, env=environment, cwd=self.directory)

    def run(self, service: str, *command: str) -> str:
        """Run what a service runs, or another command in its place; what it prints."""
        arguments, environment = self.prepared(service)
        return subprocess.run(
            command or arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120
        ).stdout

    def is_healthy(self, service: str, port: int = 8000, **places: str) -> bool:
        """Whether the service's health check, or the image's, says so."""
        told = SERVICES[service]
        command = compose.check_command(told) if "healthcheck" in told else dockerfile.CHECK
        text = json.dumps(command)
        for there, here in places.items():
            text = text.replace(there, here)
        _, environment = self.prepared(service)
        done = subprocess.run(
            json.loads(self.replaced(service, port, text)),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=60,
        )
        return done.returncode == 0

    def api(self, number: int) -> str:
        return f"http://127.0.0.1:{self.ports[f'api-{number}']}"

    def client(self, url: str = PROXY) -> httpx.Client:
        return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {self.key}"})


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All of it, in the order of `depends_on`."""
    for server, program in {"redis": "redis-server", "curl": "curl"}.items():
        if shutil.which(program) is None:
            absent(server, FileNotFoundError(f"there is no {program} to start it with"))
    directory = tmp_path_factory.mktemp("compose")
    redis_port = str(free_port())
    with ExitStack() as cleanup:
        database = cleanup.enter_context(postgresql_database())
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        cleanup.callback(store.stop)
        host, port = store.get_host_and_port()
        stack = Stack(
            directory,
            {
                f"postgresql://onnx_qat:{SECRETS['QAT_POSTGRES_PASSWORD']}@postgres:5432/onnx_qat": database,
                "redis:6379": f"127.0.0.1:{redis_port}",
                "--port 6379": f"--port {redis_port}",
                "-p 6379": f"-p {redis_port}",
                "store:8333": f"{host}:{port}",
                "0.0.0.0": "127.0.0.1",
                "/tmp/alive": f"{directory}/alive",
            },
            {"api-1": free_port(), "api-2": free_port()},
        )
        cleanup.callback(_end, stack)
        stack.run("secrets")
        stack.start("redis")
        wait_until(lambda: stack.is_healthy("redis"))
        stack.run("bucket")
        stack.run("migrate")
        stack.key = stack.run("api", "onnx-qat", "keys", "create", "--tenant", "default").strip()
        for number in (1, 2):
            stack.start("api", number)
        stack.start("worker")
        for url in (stack.api(1), stack.api(2)):
            wait_until(lambda url=url: _answers(url))
        stack.processes["proxy-1"] = start_proxy(
            directory, PROXY, store=f"{host}:{port}", apis=f"{stack.api(1)} {stack.api(2)}"
        )
        wait_until(lambda: _answers(PROXY))
        yield stack


def start_proxy(directory: Path, url: str, *, store: str, apis: str) -> subprocess.Popen[bytes]:
    """The proxy, as its image runs it but for the addresses."""
    return subprocess.Popen(
        ["caddy", "run", "--config", REPOSITORY / "deploy" / "Caddyfile", "--adapter", "caddyfile"],
        env={
            "PATH": PATH,
            "HOME": str(directory),
            "PROXY_BIND": "127.0.0.1",
            "PROXY_PORT": url.rpartition(":")[2],
            "PROXY_STORE": store,
            "PROXY_API": f"to {apis}",
        },
        stderr=subprocess.DEVNULL,
    )


def _end(stack: Stack) -> None:
    for process in reversed(stack.processes.values()):
        process.terminate()
    for process in stack.processes.values():
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


class Recorder(BaseHTTPRequestHandler):
    """Answers with the fields of the request."""

    def do_GET(self) -> None:
        content = json.dumps({"server": self.server.server_port, **self.headers}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_the_proxy_gives_the_store_requests_as_they_were_signed_and_no_keys(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with ExitStack() as cleanup:
        ports = []
        for _ in ("store", "api"):
            server = cleanup.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Recorder))
            threading.Thread(target=server.serve_forever).start()
            cleanup.callback(server.shutdown)
            ports.append(server.server_port)
        proxy = start_proxy(tmp_path, url, store=f"127.0.0.1:{ports[0]}", apis=f"http://127.0.0.1:{ports[1]}")
        cleanup.callback(proxy.wait)
        cleanup.callback(proxy.terminate)
        wait_until(lambda: _answers(url))
        secrets = {"Authorization": "Bearer key", "Cookie": "a=b"}
        seen = httpx.get(f"{url}/onnx-qat/blobs/x?X-Amz-Signature=0", headers=secrets, timeout=60).json()
        assert (seen["server"], seen["Host"]) == (ports[0], url.removeprefix("http://"))
        assert not {"Authorization", "Cookie"} & seen.keys()
        for answer in (
            httpx.put(f"{url}/onnx-qat/blobs/x", headers=secrets, timeout=60),
            httpx.get(f"{url}/v1/jobs", headers=secrets, timeout=60),
        ):
            assert (answer.json()["server"], answer.json()["Authorization"]) == (ports[1], "Bearer key")


def model() -> bytes:
    """A model that is small and takes little time."""
    value, tensor = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "weight"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [tensor(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), "weight")],
    )
    content: bytes = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return content


def test_a_job_is_submitted_to_one_api_followed_at_the_other_and_downloaded_from_the_store(
    stack: Stack,
) -> None:
    with stack.client(stack.api(1)) as one, stack.client(stack.api(2)) as other, stack.client() as proxied:
        job = one.post("/v1/prepare", files={"model": model()}).json()["id"]
        with other.stream("GET", f"/v1/jobs/{job}/events") as events:
            seen = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
        assert seen[-1]["state"] == "succeeded", seen[-1]["failure"]

        answer = proxied.get(f"/v1/jobs/{job}/bundle")
        assert answer.status_code == 307
        assert answer.headers["location"].startswith(f"{PROXY}/onnx-qat/")
        # At the same address, so that the client sends its key again.
        bundle = proxied.get(answer.headers["location"])
        assert hashlib.sha256(bundle.content).hexdigest() == seen[-1]["bundle"]["sha256"]


def test_events_pass_the_proxy_as_they_happen(stack: Stack) -> None:
    with stack.client() as client, stack.client() as observer:
        os.kill(stack.processes["worker-1"].pid, signal.SIGSTOP)
        try:
            recipe = {"weight_bits": 4}
            job = client.post("/v1/prepare", files={"model": model()}, data={"recipe": json.dumps(recipe)})
            with client.stream("GET", f"/v1/jobs/{job.json()['id']}/events") as events:
                lines = events.iter_lines()
                # The job does not get on: this has come through although more is to follow.
                assert next(lines).startswith("id: ")
                os.kill(stack.processes["worker-1"].pid, signal.SIGCONT)
                assert [line for line in lines if line][-1].startswith("data: ")
        finally:
            os.kill(stack.processes["worker-1"].pid, signal.SIGCONT)
        assert wait_for(observer, job.json()["id"])["state"] == "succeeded"


def test_uploads_pass_the_proxy_as_they_come(stack: Stack) -> None:
    part = os.urandom(2 << 20)
    host, _, port = PROXY.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            f"POST /v1/models HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {stack.key}\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {2 * len(part)}\r\n\r\n".encode()
        )
        connection.sendall(part)
        staging = stack.directory / "api" / "staging"
        wait_until(lambda: sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()) > 0)
        connection.sendall(part)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 201 ")


def test_one_api_goes_on_with_an_upload_that_another_one_began(stack: Stack) -> None:
    content = os.urandom(1 << 16)
    tus = {"Tus-Resumable": "1.0.0"}
    patch = {**tus, "Content-Type": "application/offset+octet-stream"}
    with stack.client(stack.api(1)) as one, stack.client(stack.api(2)) as other:
        created = one.post("/v1/uploads/tus", headers={**tus, "Upload-Length": str(len(content))})
        assert created.status_code == 201, created.text
        path = httpx.URL(created.headers["location"]).path
        for client, offset in ((one, 0), (other, 1 << 15)):
            answer = client.patch(
                path,
                content=content[offset : offset + (1 << 15)],
                headers={**patch, "Upload-Offset": str(offset)},
            )
            assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(offset + (1 << 15)))


def test_health_checks_tell_what_runs_from_what_does_not(stack: Stack) -> None:
    assert stack.is_healthy("api", stack.ports["api-1"])
    assert not stack.is_healthy("api", free_port())
    assert stack.is_healthy("redis")
    assert not stack.is_healthy("redis", **{"-p 6379": f"-p {free_port()}"})
    wait_until(lambda: stack.is_healthy("worker"))
    stale = stack.directory / "stale"
    stale.touch()
    os.utime(stale, (0, 0))
    assert not stack.is_healthy("worker", **{"/tmp/alive": str(stale)})
    assert not stack.is_healthy("worker", **{"/tmp/alive": str(stack.directory / "absent")})


def test_the_worker_that_is_asked_to_stop_removes_its_sign_of_life(stack: Stack) -> None:
    wait_until((stack.directory / "alive").exists)
    stack.processes["worker-1"].terminate()
    assert stack.processes["worker-1"].wait(60) == 0
    assert not (stack.directory / "alive").exists()


def test_one_api_takes_over_from_the_other(stack: Stack) -> None:
    stack.processes["api-1"].kill()
    stack.processes["api-1"].wait()
    with stack.client() as client:
        assert {client.get("/v1/jobs").status_code for _ in range(20)} == {200}
