"""Uploads by clients that are slow, lie, or try what a form or a file name could do."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from service_helpers import Server, assert_problem, wait_until

SECONDS = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service in a process of its own that is impatient."""
    server = Server(
        tmp_path_factory.mktemp("hostile") / "data",
        ONNX_QAT_UPLOAD_TIMEOUT_SECONDS=str(SECONDS),
    )
    yield server
    server.stop()


@pytest.fixture
def data(server: Server) -> Iterator[Path]:
    """The service's data directory; afterwards nothing is left of what the test sent."""
    data = server.data
    yield data
    deadline = time.monotonic() + 30
    while any((data / "staging").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (data / "blobs").exists()


@contextlib.contextmanager
def connected(server: Server, head: str, body: bytes = b"") -> Iterator[socket.socket]:
    """A connection on which a request was sent: its lines, and some of its body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        lines = [line.strip() for line in head.strip().splitlines()]
        connection.sendall("\r\n".join([*lines, "Host: localhost", "", ""]).encode() + body)
        yield connection


def answer_on(connection: socket.socket) -> httpx.Response:
    """All that the service sends until it closes the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    headers = [tuple(field.split(": ", 1)) for field in fields]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


POST = "POST /v1/models HTTP/1.1\nContent-Length: 5000000"


def descriptors(server: Server) -> int:
    """Without those of connections to the database, which are kept for the next request."""
    count = 0
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += not link.readlink().name.startswith("onnx-qat.db")
    return count


# Slow clients.


def test_a_silent_client_is_given_up(server: Server, data: Path) -> None:
    before = descriptors(server)
    with connected(server, POST, bytes(3_000_000)) as connection:
        assert_problem(answer_on(connection), 408, "upload_timeout")
    wait_until(lambda: descriptors(server) <= before)


def test_trickling_does_not_help(server: Server, data: Path) -> None:
    with connected(server, POST) as connection:
        connection.settimeout(0.05)
        started = time.monotonic()
        received = b""
        while not received:
            assert time.monotonic() < started + 30
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
    assert b" 408 " in received
    assert time.monotonic() - started >= SECONDS


def test_a_slow_client_that_keeps_the_pace_is_served(start_server: Callable[..., Server]) -> None:
    """Longer than the period altogether, and not in any part of it."""
    seconds = 5.0
    server = start_server(ONNX_QAT_UPLOAD_TIMEOUT_SECONDS=str(seconds))
    content = os.urandom(400_000)
    length = {"Content-Length": str(len(content)), "Content-Digest": f"sha-256=:{b64(b'other')}:"}

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(content), 100_000):
            time.sleep(seconds * 0.3)  # not waited for: it is what is tested
            yield content[start : start + 100_000]

    answer = httpx.post(f"{server.url}/v1/models", content=slowly(), headers=length, timeout=60)
    assert_problem(answer, 422, "digest_mismatch")


def test_a_json_body_that_does_not_come_is_given_up_too(server: Server, data: Path) -> None:
    head = "POST /v1/jobs HTTP/1.1\nContent-Type: application/json\nContent-Length: 10"
    with connected(server, head, b"{") as connection:
        assert_problem(answer_on(connection), 408, "upload_timeout")


def test_more_uploads_than_are_allowed_are_told_to_come_back(start_client) -> None:
    client = start_client(max_uploads_at_once=1)
    piece = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    with client.app.state.services.intake.admitted():  # as an upload is while it is received
        for answer in (
            client.post("/v1/models", content=b"model"),
            client.post("/v1/prepare", content=b"", headers=form),
            client.post("/v1/uploads/tus", content=b"x", headers={**piece, "Upload-Length": "5"}),
        ):
            assert_problem(answer, 503, "uploads_busy")
            assert int(answer.headers["Retry-After"]) > 0
        assert client.get("/v1/jobs").status_code == 200
    assert client.post("/v1/models", content=b"model").status_code == 201


# Lies about the length, and encodings.


def test_a_body_shorter_than_its_length_is_an_aborted_upload(server: Server, data: Path) -> None:
    with connected(server, POST, bytes(100_000)) as connection:
        connection.shutdown(socket.SHUT_WR)
        received = connection.recv(65536)
    assert b" 201 " not in received


def test_what_follows_the_announced_length_belongs_to_no_upload(server: Server) -> None:
    head = "POST /v1/models HTTP/1.1\nContent-Length: 5\nContent-Digest: sha-256=:" + b64(b"x") + ":"
    with connected(
        server, head, b"modelGET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    ) as c:
        answer = answer_on(c)
    assert answer.status_code == 422
    assert hashlib.sha256(b"model").hexdigest() in answer.text


@pytest.mark.parametrize("length", ["-1", "5, 6", "0x5", "5\nContent-Length: 6", "9" * 30])
def test_a_length_that_is_none_is_refused(server: Server, data: Path, length: str) -> None:
    with connected(server, f"POST /v1/models HTTP/1.1\nContent-Length: {length}", b"model") as connection:
        assert answer_on(connection).status_code in (400, 413)


def test_a_body_without_length_is_taken(client: TestClient) -> None:
    assert client.post("/v1/models", content=iter([b"mo", b"del"])).status_code == 201


@pytest.mark.parametrize("address", ["/v1/models", "/v1/prepare", "/v1/jobs"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x"])
def test_an_encoded_body_is_refused(client: TestClient, address: str, encoding: str) -> None:
    types = {"/v1/prepare": "multipart/form-data; boundary=b", "/v1/jobs": "application/json"}
    headers = {"Content-Encoding": encoding, "Content-Type": types.get(address, "")}
    answer = client.post(address, content=b"\x1f\x8b", headers=headers)
    assert_problem(answer, 415, "content_encoding_unsupported")
    assert answer.headers["Accept-Encoding"] == "identity"


def test_identity_is_no_encoding(client: TestClient) -> None:
    answer = client.post("/v1/models", content=b"model", headers={"Content-Encoding": "identity"})
    assert answer.status_code == 201


@pytest.mark.parametrize("size", [70_000, 5_000_000])
def test_a_huge_header_is_refused_without_being_kept(server: Server, data: Path, size: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{server.url}/health/live", timeout=60).status_code == 200


# Announced digests.


def b64(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


FORMS = {"Content-Digest": "sha-256=:{}:", "Repr-Digest": "sha-256=:{}:", "Digest": "SHA-256={}"}


@pytest.mark.parametrize("name", FORMS)
def test_an_upload_is_stored_only_if_it_is_what_was_announced(
    client: TestClient, tmp_path: Path, name: str
) -> None:
    wrong, right = (FORMS[name].format(b64(content)) for content in (b"other", b"model"))
    answer = client.post("/v1/models", content=b"model", headers={name: wrong})
    assert_problem(answer, 422, "digest_mismatch")
    assert not (tmp_path / "data/blobs").exists()
    assert list((tmp_path / "data/staging").iterdir()) == []
    for value in (right, f"md5=AAAA, {right}", f"{right}, sha-512=AAAA"):
        assert client.post("/v1/models", content=b"model", headers={name: value}).status_code in (200, 201)


def test_the_digest_of_a_form_is_that_of_its_whole_body(client: TestClient, tmp_path: Path) -> None:
    body = form(("model", "m", b"model"))
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    wrong = {**headers, "Content-Digest": f"sha-256=:{b64(b'model')}:"}
    for address in ("/v1/models", "/v1/prepare"):
        assert_problem(client.post(address, content=body, headers=wrong), 422, "digest_mismatch")
    assert not (tmp_path / "data/blobs").exists()
    right = {**headers, "Content-Digest": f"sha-256=:{b64(body)}:"}
    assert client.post("/v1/models", content=body, headers=right).status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Digest": "sha-256=:AAAA:"},
        {"Content-Digest": f"sha-256={b64(b'x')}"},
        {"Digest": "sha-256=???"},
        {"Repr-Digest": "sha-256=::"},
        {"Content-Digest": f"sha-256=:{b64(b'a')}:", "Digest": f"sha-256={b64(b'b')}"},
    ],
)
def test_a_malformed_digest_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    assert_problem(client.post("/v1/models", content=b"model", headers=headers), 422, "request_invalid")


def test_algorithms_that_are_not_known_are_ignored_as_rfc_9530_says(client: TestClient) -> None:
    headers = {"Content-Digest": "unknown=:AAAA:, md5=:AAAA:"}
    assert client.post("/v1/models", content=b"model", headers=headers).status_code == 201


# Forms.


def form(*parts: tuple[str, str, bytes]) -> bytes:
    """A form with the boundary "b": field, all that follows `filename=`, content."""
    return (
        b"".join(
            f'--b\r\nContent-Disposition: form-data; name="{field}"; filename={name}\r\n\r\n'.encode()
            + content
            + b"\r\n"
            for field, name, content in parts
        )
        + b"--b--\r\n"
    )


def post_form(client: httpx.Client, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return client.post("/v1/models", content=body, headers=headers)


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        '"../../escaped"',
        '"..\\\\..\\\\escaped"',
        '"/tmp/escaped"',
        '"a/../../escaped"',
        '"."',
        '".."',
        '""',
        '"a\x00b"',
        '"a\x7fb"',
        '"a\u202eb"',
        '"a\u2028b"',
        '"\u00ad"',
        '"' + "ä" * 128 + '"',
        '"model.onnx"',
    ],
)
def test_a_file_name_that_could_do_something_is_refused(
    client: TestClient, tmp_path: Path, name: str
) -> None:
    before = everything(tmp_path)
    answer = post_form(client, form(("model", '"m"', b"model"), ("external_data", name, b"w")))
    assert answer.status_code == 422
    assert answer.json()["code"] in ("external_data_outside", "file_name_invalid")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        # Nothing is decoded that a client did not decode: these are names like others.
        ('"..%2f..%2fescaped"', "..%2f..%2fescaped"),
        ('"%2e%2e"', "%2e%2e"),
        ('"%00"', "%00"),
        ('"...."', "...."),
        ('"-rf"', "-rf"),
        ('"~"', "~"),
        # One dot leader, fullwidth solidus: not what they look like.
        ('"\u2024\u2024\uff0fescaped"', "\u2024\u2024\uff0fescaped"),
        # Some browsers send a whole path of Windows; its last part is the name.
        ('"C:\\\\models\\\\w.bin"', "w.bin"),
        ('"\\\\\\\\host\\\\models\\\\w.bin"', "w.bin"),
    ],
)
def test_a_name_that_only_looks_dangerous_stays_a_name(
    client: TestClient, tmp_path: Path, name: str, kept: str
) -> None:
    answer = post_form(client, form(("model", '"m"', b"model"), ("external_data", name, b"w")))
    assert answer.status_code == 201, answer.text
    assert {file["name"] for file in answer.json()["files"]} == {"model.onnx", kept}
    stored = {path.name for path in (tmp_path / "data/blobs").rglob("*") if path.is_file()}
    assert stored == {hashlib.sha256(content).hexdigest() for content in (b"model", b"w")}
    assert everything(tmp_path) == {path for path in everything(tmp_path) if path.startswith("data")}


def test_an_encoded_parameter_cannot_bring_a_path(client: TestClient, tmp_path: Path) -> None:
    """RFC 7578, section 4.2, forbids filename* in forms."""
    part = (
        b"--b\r\nContent-Disposition: form-data; name=\"external_data\"; filename*=UTF-8''..%2F..%2Fescaped"
        b"\r\n\r\nw\r\n"
    )
    answer = post_form(client, part + form(("model", '"m"', b"model")))
    assert answer.status_code == 422
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_field_that_comes_twice_is_refused(client: TestClient, tmp_path: Path) -> None:
    answer = post_form(client, form(("model", '"m"', b"1"), ("model", '"m"', b"2")))
    assert assert_problem(answer, 422, "file_name_invalid")["file"] == "model.onnx"
    assert not (tmp_path / "data/blobs").exists()


def test_ten_thousand_parts_are_refused_at_the_first_too_many(client: TestClient, tmp_path: Path) -> None:
    parts = [("external_data", f'"w{number}"', b"x") for number in range(10_000)]
    answer = post_form(client, form(("model", '"m"', b"model"), *parts))
    assert re.search("more than 256 parts", assert_problem(answer, 413, "request_too_large")["detail"])
    assert list((tmp_path / "data/staging").iterdir()) == []


@pytest.mark.parametrize(
    "headers",
    [b"X: " + b"x" * 20_000, b"x" * 20_000 + b": x", b"\r\n".join(b"X%d: x" % n for n in range(5000))],
    ids=["value", "name", "many"],
)
def test_headers_of_a_part_are_bounded(client: TestClient, headers: bytes) -> None:
    body = b"--b\r\n" + headers + b"\r\n" + form(("model", '"m"', b"model")).removeprefix(b"--b\r\n")
    assert_problem(post_form(client, body), 422, "request_invalid")
