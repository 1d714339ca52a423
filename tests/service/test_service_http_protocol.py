"""A header, or the rest of a body, that does not come to its end; a request that takes its time."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import h11
import pytest
import uvicorn
from service_helpers import wait_until
from starlette.types import Receive, Scope, Send

from service.http_protocol import PunctualH11Protocol

PATIENT, IMPATIENT = 60.0, 0.5
"""Seconds in which a header must come."""

Connect = Callable[..., socket.socket]


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """With the body's SHA-256 when it is complete; at /early before that."""
    digest, more = hashlib.sha256(), scope["path"] != "/early"
    while more:
        message = await receive()
        digest.update(message["body"])
        more = message["more_body"]
    text = digest.hexdigest().encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"64")]})
    await send({"type": "http.response.body", "body": text})


@contextmanager
def serving(first: float, later: float) -> Iterator[socket.socket]:
    class Protocol(PunctualH11Protocol):
        header_seconds = first

        def on_response_complete(self) -> None:
            self.header_seconds = later
            super().on_response_complete()

    server = uvicorn.Server(
        uvicorn.Config(
            answer,
            port=0,
            http=Protocol,
            lifespan="off",
            log_config=None,
            timeout_keep_alive=120,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        address = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address, timeout=60) as connection:
            yield connection
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connects to a server that waits so long for the first header, and so long after each answer."""
    with ExitStack() as stack:
        yield lambda first, later: stack.enter_context(serving(first, later))


@pytest.fixture
def connection(connect: Connect) -> socket.socket:
    """A connection to a server that waits long for headers, and longer between requests."""
    return connect(PATIENT, PATIENT)


def drip(connection: socket.socket, text: bytes) -> None:
    """Send the beginning of something again and again, until the server has closed the connection."""
    deadline = time.monotonic() + 30
    connection.settimeout(0.05)
    while time.monotonic() < deadline:
        try:
            connection.sendall(text)
            if connection.recv(100) == b"":
                return
        except TimeoutError:
            continue
        except ConnectionError:
            return
    raise AssertionError("the connection is still open")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_header_that_does_not_end_is_given_up(connect: Connect, sent: bytes) -> None:
    connection = connect(IMPATIENT, PATIENT)
    connection.sendall(sent)
    drip(connection, b"X: y\r\n" if sent else b"")


def test_neither_is_one_after_a_complete_request(connect: Connect) -> None:
    connection = connect(PATIENT, IMPATIENT)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    drip(connection, b"G")


def test_a_body_may_take_longer_and_another_request_follows(connect: Connect) -> None:
    seconds = 1.5
    connection = connect(seconds, seconds)
    for _ in range(2):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\na")
        time.sleep(1.2 * seconds)  # not waited for: it is what is tested
        connection.sendall(b"b")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("piece", [1 << 10, 300_000, 1 << 22])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_bodies_arrive_as_they_were_sent_and_requests_may_follow_at_once(
    connection: socket.socket, piece: int, framing: str
) -> None:
    bodies = [random.Random(seed).randbytes(size) for seed, size in enumerate([3_000_000, 1, 70_000, 0, 5])]
    sent = bytearray()
    for body in bodies:
        if framing == "length":
            header, content = b"Content-Length: %d" % len(body), body
        else:
            half = len(body) // 2
            chunks = [chunk for chunk in (body[:half], body[half:]) if chunk]
            header = b"Transfer-Encoding: chunked"
            content = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        sent += b"POST / HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n%s" % (header, content)

    def send() -> None:
        for start in range(0, len(sent), piece):
            connection.sendall(sent[start : start + piece])

    sender = threading.Thread(target=send)
    sender.start()
    with connection.makefile("rb") as answers:
        for body in bodies:
            while answers.readline() != b"\r\n":
                pass
            assert answers.read(64).decode() == hashlib.sha256(body).hexdigest()
    sender.join()


def test_most_of_a_large_body_passes_h11_by(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = 0
    receive_data = h11.Connection.receive_data

    def count(self: h11.Connection, data: bytes) -> None:
        nonlocal parsed
        parsed += len(data)
        receive_data(self, data)

    monkeypatch.setattr(h11.Connection, "receive_data", count)
    body = bytes(16 << 20)
    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert 0 < parsed < len(body) / 8


def answer_early(connection: socket.socket, length: int) -> None:
    """Let a request be answered before its body has come."""
    head = f"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("first", "then"), [(b"x", b""), (b"", b"x")])
def test_the_rest_of_a_body_that_is_answered_is_given_up(connect: Connect, first: bytes, then: bytes) -> None:
    connection = connect(PATIENT, IMPATIENT)
    answer_early(connection, 1 << 30)
    connection.sendall(first)
    drip(connection, then)


def test_the_rest_of_a_body_may_come_after_the_answer_and_another_request_follows(
    connection: socket.socket,
) -> None:
    for _ in range(2):
        answer_early(connection, 2)
        connection.sendall(b"a")
        time.sleep(0.1)  # not waited for: it is what is tested
        connection.sendall(b"b")
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_who_sends_a_body_to_its_end_can_read_the_answer_that_came_before(connection: socket.socket) -> None:
    size = 16 << 20
    head = f"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    connection.sendall(head.encode() + bytes(size))
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
