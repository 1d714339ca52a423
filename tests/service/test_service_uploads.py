"""Uploads: stored once, under their digest, whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import itertools
import os
import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from service_helpers import Server, assert_problem, wait_until

from service.uploads import intake

SHA = hashlib.sha256


def stored_files(data: Path) -> list[str]:
    return sorted(str(path.relative_to(data)) for path in (data / "blobs").rglob("*") if path.is_file())


def blob(content: bytes) -> str:
    digest = SHA(content).hexdigest()
    return f"blobs/{digest[:2]}/{digest}"


@pytest.mark.parametrize(
    ("collection", "name"),
    [("models", "model.onnx"), ("datasets", "data.npz"), ("checkpoints", "checkpoint")],
)
def test_a_raw_upload_is_stored_once_under_the_digest_of_its_content(
    client: TestClient, tmp_path: Path, collection: str, name: str
) -> None:
    content = b"some bytes" * 300_000
    first = client.post(f"/v1/{collection}", content=content)
    assert first.status_code == 201
    body = first.json()
    assert body["id"] == SHA(content).hexdigest()
    assert body["bytes"] == len(content)
    assert body["files"] == [{"name": name, "bytes": len(content), "sha256": body["id"]}]
    assert first.headers["location"] == f"/v1/{collection}/{body['id']}"

    again = client.post(f"/v1/{collection}", content=content)
    assert (again.status_code, again.json()) == (200, body)
    assert client.get(first.headers["location"]).json() == body
    assert (tmp_path / "data" / blob(content)).read_bytes() == content
    assert stored_files(tmp_path / "data") == [blob(content)]


def test_a_form_with_only_the_file_has_the_same_id_as_the_raw_body(client: TestClient) -> None:
    raw = client.post("/v1/models", content=b"model")
    form = client.post("/v1/models", files={"model": ("any name", b"model")})
    assert (raw.status_code, form.status_code) == (201, 200)
    assert form.json()["id"] == raw.json()["id"]


def test_external_data_is_listed_under_its_own_name(client: TestClient, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 20_000
    parts = [
        ("external_data", ("weights.bin", weights)),
        ("model", ("m.onnx", b"model")),
        ("external_data", ("größe.data", b"more")),
    ]
    answer = client.post("/v1/models", files=parts)
    assert answer.status_code == 201
    identifier = answer.json()["id"]
    contents = {"model.onnx": b"model", "weights.bin": weights, "größe.data": b"more"}
    assert {file["name"]: file["sha256"] for file in answer.json()["files"]} == {
        name: SHA(content).hexdigest() for name, content in contents.items()
    }
    assert stored_files(tmp_path / "data") == sorted(blob(content) for content in contents.values())
    assert client.post("/v1/models", files=parts[::-1]).json()["id"] == identifier


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../weights.bin", "external_data_outside"),
        ("/etc/passwd", "external_data_outside"),
        ("sub/weights.bin", "external_data_outside"),
        ("..", "external_data_outside"),
        (".", "external_data_outside"),
        ("a\\..\\b", "external_data_outside"),
        ("model.onnx", "file_name_invalid"),
        ("x" * 256, "file_name_invalid"),
        ("a\x07b", "file_name_invalid"),
    ],
)
def test_external_data_cannot_leave_its_upload(
    client: TestClient, tmp_path: Path, name: str, code: str
) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="model"; filename="m"\r\n\r\nmodel\r\n'
        b'--b\r\nContent-Disposition: form-data; name="external_data"; filename="'
        + name.replace("\\", "\\\\").encode()
        + b'"\r\n\r\nweights\r\n--b--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/models", content=body, headers=headers)
    problem = assert_problem(answer, 422, code)
    assert problem["field"] == "external_data"
    assert stored_files(tmp_path / "data") == []


def test_two_files_of_one_name_are_refused(client: TestClient) -> None:
    parts = [("model", b"model"), ("external_data", ("w", b"1")), ("external_data", ("w", b"2"))]
    assert assert_problem(client.post("/v1/models", files=parts), 422, "file_name_invalid")["file"] == "w"


def test_an_unknown_form_field_is_named(client: TestClient) -> None:
    answer = client.post("/v1/datasets", files={"model": b"x"})
    assert assert_problem(answer, 422, "request_invalid")["field"] == "model"


def test_a_form_without_its_file_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/models", files={"external_data": ("w", b"1")})
    assert assert_problem(answer, 422, "request_invalid")["field"] == "model"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--b"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"nonsense"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nthe end is missing',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n',
        ),
    ],
)
def test_a_malformed_form_is_refused(
    client: TestClient, tmp_path: Path, content_type: str, body: bytes
) -> None:
    answer = client.post("/v1/models", content=body, headers={"content-type": content_type})
    assert_problem(answer, 422, "request_invalid")
    assert stored_files(tmp_path / "data") == []


def test_an_empty_file_is_refused(client: TestClient) -> None:
    assert_problem(client.post("/v1/models", content=b""), 422, "upload_empty")
    assert_problem(client.post("/v1/models", files={"model": b""}), 422, "upload_empty")


def test_a_media_type_that_is_no_file_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/models", content=b"{}", headers={"content-type": "text/plain"})
    assert_problem(answer, 415, "media_type_unsupported")


def test_an_unknown_or_malformed_id_is_said_to_be_so(client: TestClient) -> None:
    unknown = "0" * 64
    assert_problem(client.get(f"/v1/models/{unknown}"), 404, "model_not_found")
    assert_problem(client.get(f"/v1/datasets/{unknown}"), 404, "data_not_found")
    assert_problem(client.get(f"/v1/checkpoints/{unknown}"), 404, "checkpoint_not_found")
    assert assert_problem(client.get("/v1/models/x"), 422, "request_invalid")["field"] == "upload_id"


def test_an_upload_beyond_the_limit_is_refused_by_its_announced_and_by_its_real_size(
    start_client, tmp_path: Path
) -> None:
    client = start_client(max_upload_bytes=1000)

    def unannounced() -> Iterator[bytes]:
        for _ in range(11):
            yield bytes(100)

    assert client.post("/v1/models", content=bytes(1000)).status_code == 201
    assert_problem(client.post("/v1/models", content=bytes(1001)), 413, "request_too_large")
    assert_problem(client.post("/v1/models", content=unannounced()), 413, "request_too_large")
    assert_problem(client.post("/v1/models", files={"model": bytes(1001)}), 413, "request_too_large")
    assert len(stored_files(tmp_path / "data")) == 1
    assert list((tmp_path / "data/staging").iterdir()) == []


def test_a_form_of_too_many_files_is_refused(start_client) -> None:
    client = start_client(max_upload_files=3)
    parts = [("model", b"model"), *(("external_data", (f"w{i}", b"1")) for i in range(3))]
    assert_problem(client.post("/v1/models", files=parts), 413, "request_too_large")


def test_a_full_disk_is_said_to_be_so(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert_problem(client.post("/v1/models", content=b"model"), 507, "storage_full")
    monkeypatch.undo()
    assert stored_files(tmp_path / "data") == []
    assert list((tmp_path / "data/staging").iterdir()) == []


def test_an_upload_that_breaks_off_leaves_nothing(start_server, tmp_path: Path) -> None:
    server: Server = start_server()
    staging = tmp_path / "data/staging"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n" + bytes(2 << 20)
        )
        wait_until(lambda: any(path.is_file() for path in staging.rglob("*")))
    wait_until(lambda: not any(staging.iterdir()))
    assert stored_files(tmp_path / "data") == []


def test_the_same_bytes_are_stored_once_whatever_they_are_uploaded_as(
    client: TestClient, tmp_path: Path
) -> None:
    for collection in ("models", "datasets", "checkpoints"):
        assert client.post(f"/v1/{collection}", content=b"same").status_code == 201
    parts = [("model", b"same"), ("external_data", ("w", b"same"))]
    assert client.post("/v1/models", files=parts).status_code == 201
    assert stored_files(tmp_path / "data") == [blob(b"same")]


def test_the_memory_of_the_service_does_not_grow_with_an_upload(start_server) -> None:
    """256 MiB; `benchmarks/upload.py` does it with 4 GiB."""
    server: Server = start_server()
    process = Path(f"/proc/{server.process.pid}")

    def peak_mib() -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    with httpx.Client(base_url=server.url, timeout=300) as client:
        assert client.post("/v1/models", content=b"warm").status_code == 201
        (process / "clear_refs").write_text("5")  # the peak so far is forgotten
        before = peak_mib()
        answer = client.post("/v1/models", content=itertools.repeat(os.urandom(1 << 20), 256))
        assert (answer.status_code, answer.json()["bytes"]) == (201, 256 << 20)
        assert peak_mib() - before < 64
    shutil.rmtree(server.data / "blobs")  # pytest keeps the rest for a while


def test_a_large_file_is_on_disk_as_it_was_sent(start_server) -> None:
    """Most of it is written past the page cache, its end is not."""
    content = random.Random(0).randbytes((66 << 20) + 123)
    server: Server = start_server()
    with server.client() as client:
        assert client.post("/v1/models", content=content).status_code == 201
    assert (server.data / blob(content)).read_bytes() == content


class WithoutDirectWrites(io.FileIO):
    """A file on a file system that has none."""

    refused = 0

    def write(self, data: Any) -> int:
        if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT:
            self.refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(data)


@pytest.mark.parametrize(("start", "refused"), [(64 << 20, 1), ((64 << 20) + 1, 0), (0, 0)])
def test_a_block_that_cannot_pass_the_page_cache_by_goes_through_it(
    start: int, refused: int, tmp_path: Path
) -> None:
    block = random.Random(0).randbytes(1 << 20)
    with WithoutDirectWrites(tmp_path / "file", "wb") as file:
        file.seek(start)
        intake._append(file, memoryview(block), (), 0)
        assert file.refused == refused
    assert (tmp_path / "file").read_bytes()[start:] == block


def test_neither_does_one_on_a_file_system_that_refuses_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return flags

    monkeypatch.setattr(intake.fcntl, "fcntl", refuse)
    block = random.Random(0).randbytes(1 << 20)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.seek(64 << 20)
        intake._append(file, memoryview(block), (), 0)
    assert (tmp_path / "file").read_bytes()[64 << 20 :] == block
