"""Logs: one format for all, a request id from the client to the worker, no secrets."""

from __future__ import annotations

import datetime
import io
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import structlog
import uvicorn
from fastapi.testclient import TestClient
from service_helpers import free_port, wait_until
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from starlette.types import Receive, Scope, Send

from service.database import Database
from service.logs import RequestLog, configure_process_logs
from service.settings import Settings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def start_logs() -> Iterator[Callable[..., io.StringIO]]:
    """Sends the logs of this process to a buffer, as the settings say."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers, root.level, threading.excepthook

    def start(**settings: Any) -> io.StringIO:
        written = io.StringIO()
        configure_process_logs(Settings(**settings))
        (handler,) = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(written)
        return written

    yield start
    logging.captureWarnings(False)
    root.handlers, root.level, threading.excepthook = handlers, level, hook


@pytest.fixture
def json_lines(start_logs: Callable[..., io.StringIO]) -> Lines:
    """The logs so far; each line must be a JSON object."""
    written = start_logs(log_format="json", log_level="debug")
    return lambda: [json.loads(line) for line in written.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-Request-ID": "nightly-7.b_2"}, "nightly-7.b_2"),
        ({"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}, TRACE),
        ({"X-Request-ID": "mine", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}, "mine"),
        ({"X-Request-ID": "a b"}, None),
        ({"X-Request-ID": "a\x1b[31m"}, None),
        ({"X-Request-ID": "x" * 65}, None),
        ({"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"}, None),
        ({"traceparent": f"ff-{TRACE}-00f067aa0ba902b7-01"}, None),
        ({"traceparent": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_request_has_the_id_that_its_client_gave_or_a_new_one(
    client: TestClient, headers: dict[str, str], expected: str | None
) -> None:
    answer = client.get("/nothing", headers=headers)
    given = answer.headers["X-Request-ID"]
    assert given == expected if expected else len(given) == 32 and given != TRACE
    assert answer.json()["request_id"] == given, "the problem document names the request too"


def test_an_unexpected_error_names_its_request_in_the_answer(client: TestClient) -> None:
    services, client.app.state.services = client.app.state.services, None  # type: ignore[attr-defined]
    answer = client.get("/v1/jobs", headers={"X-Request-ID": "r5"})
    client.app.state.services = services  # type: ignore[attr-defined]
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers.get_list("X-Request-ID") == ["r5"]
    assert answer.json()["request_id"] == "r5"


def test_what_the_server_logs_of_a_failed_request_names_it(json_lines: Lines) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    port = free_port()
    config = uvicorn.Config(RequestLog(fail), port=port, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    httpx.get(f"http://127.0.0.1:{port}/", headers={"X-Request-ID": "r6"}, timeout=60)
    server.should_exit = True
    thread.join()
    lines = json_lines()
    (error,) = [line for line in lines if line["level"] == "error"]
    assert error["request"] == "r6"
    assert "RuntimeError: broken" in error["exception"]
    (request,) = [line for line in lines if line["event"] == "request"]
    assert (request["request"], request["status"]) == ("r6", 500)
    # What belongs to no request names none.
    assert "request" not in lines[-1]


@pytest.mark.parametrize("name", ["uvicorn.error", "sqlalchemy.pool", "celery.worker", "alembic", "anything"])
def test_libraries_log_in_the_same_format(json_lines: Lines, name: str) -> None:
    with structlog.contextvars.bound_contextvars(request="r1", job="j1"):
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logging.getLogger(name).exception("failed with %s", "this\nand that")
    (line,) = json_lines()
    assert (line["event"], line["level"]) == ("failed with this\nand that", "error")
    assert (line["request"], line["job"]) == ("r1", "j1")
    assert "ValueError: first\nsecond" in line["exception"]
    assert datetime.datetime.fromisoformat(line["timestamp"]).tzinfo == datetime.UTC


def test_warnings_and_the_end_of_threads_are_logged(json_lines: Lines) -> None:
    warnings.warn("old", stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0, name="some thread")
    thread.start()
    thread.join()
    warning, error = json_lines()
    assert "old" in warning["event"]
    assert error["thread"] == "some thread"
    assert "ZeroDivisionError" in error["exception"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_passwords_and_keys_are_not_logged(start_logs: Callable[..., io.StringIO], log_format: str) -> None:
    buffer = start_logs(log_format=log_format)
    log = structlog.get_logger()
    log.info("connecting", url="redis://user:sesame@host:6379/0")
    log.info("odd", key="oqat_a4da68389ba72a01_sesame")
    log.info("connecting to postgresql://user:sesame@host/database")
    headers = {"authorization": "Basic sesame"}
    try:
        if headers:
            raise RuntimeError("Authorization: Bearer sesame")
    except RuntimeError:
        log.exception("failed")  # without the values of local variables
    written = buffer.getvalue()
    assert "sesame" not in written
    assert "redis://user:***@host:6379/0" in written
    assert "Bearer ***" in written
    assert "oqat_a4da68389ba72a01_***" in written


def test_a_query_is_not_logged(start_client, start_logs: Callable[..., io.StringIO]) -> None:
    client = start_client()
    buffer = start_logs(log_level="debug")
    client.get("/v1/jobs", params={"token": "sesame"})
    client.get("/" + "x" * 5000, params={"token": "sesame"})
    written = buffer.getvalue()
    assert "/v1/jobs" in written
    assert "sesame" not in written
    assert "x" * 1000 not in written


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_what_clients_choose_is_cut_in_every_line(
    start_client, start_logs: Callable[..., io.StringIO], log_format: str
) -> None:
    client = start_client(auth="keys")
    buffer = start_logs(log_format=log_format)
    client.get("/v1/" + "x" * 60_000)
    client.request("X" * 5000, "/v1/jobs")
    written = buffer.getvalue()
    assert "access refused" in written
    assert "x" * 150 in written
    assert "x" * 201 not in written
    assert "X" * 201 not in written


def test_what_browsers_say_is_cut_too(start_client, start_logs: Callable[..., io.StringIO]) -> None:
    client = start_client()
    buffer = start_logs()
    client.get("/v1/jobs", headers={"Host": "h" * 5000})
    client.get("/v1/jobs", headers={"Origin": "http://" + "o" * 5000})
    written = buffer.getvalue()
    assert written.count("access refused") == 2
    assert "h" * 201 not in written
    assert "o" * 201 not in written


@pytest.mark.parametrize("colors", [True, False])
def test_the_console_shows_what_a_terminal_would_act_upon(
    start_client,
    start_logs: Callable[..., io.StringIO],
    colors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: colors, raising=False)
    client = start_client()
    buffer = start_logs()
    client.get("/v1/jobs/%00%1b%5d0;owned%07%c2%9b2J%e2%80%ae")
    log = structlog.get_logger()
    log.info("job failed", detail="bell\x07 and more")
    logging.getLogger("library").warning("one\x1b[2J\nforged [info] job succeeded")
    try:
        raise ValueError("raised\x1b[2J")
    except ValueError:
        log.exception("failed")
    written = buffer.getvalue()
    for shown in (r"\x00\x1b]0;owned\x07\x9b2J\u202e", r"bell\x07", r"one\x1b[2J", r"raised\x1b[2J"):
        assert shown in written.replace("\\\\", "\\")
    if not colors:
        assert all(char.isprintable() or char == "\n" for char in written)
    assert not any(char in written for char in "\x00\x07\x9b\u202e")
    assert "\x1b[2J" not in written
    assert "\nforged" not in written


def test_values_are_not_in_errors_of_the_database() -> None:
    database = Database("sqlite://")
    with pytest.raises(OperationalError) as raised, database.reading() as session:
        session.execute(text("SELECT :secret FROM nowhere"), {"secret": "sesame"})
    assert "sesame" not in str(raised.value)


def test_what_watches_the_service_is_not_logged_unless_it_fails(
    start_client, start_logs: Callable[..., io.StringIO]
) -> None:
    client = start_client()
    buffer = start_logs(log_format="json")
    client.get("/health/live")
    client.get("/metrics")
    client.get("/health/nothing")
    lines = [json.loads(line) for line in buffer.getvalue().splitlines()]
    assert [line["path"] for line in lines if line["event"] == "request"] == ["/health/nothing"]
