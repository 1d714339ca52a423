"""The service in this process, and in a process of its own."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_helpers import FAKE_WORKER, Server, assert_documented

from service.app import create_app
from service.settings import Settings
from service.worker import process

StartClient = Callable[..., TestClient]


@pytest.fixture
def start_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartClient]:
    """Starts the service in this process, with the given settings and the fake worker."""
    monkeypatch.setattr(process, "COMMAND", FAKE_WORKER)
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> TestClient:
            app = create_app(Settings(data_dir=tmp_path / "data", log_level="warning", **settings))
            client = stack.enter_context(
                TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
            )
            client.event_hooks = {"response": [assert_documented]}
            return client

        yield start


@pytest.fixture
def client(start_client: StartClient) -> TestClient:
    """The service in this process, with default settings."""
    return start_client()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts the service in a process of its own."""
    servers: list[Server] = []

    def start(log: Path | None = None, **environment: str) -> Server:
        servers.append(Server(tmp_path / "data", log, **environment))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
