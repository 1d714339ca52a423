"""Resumable uploads: tus 1.0.0, each of its rules that we answer for, and what becomes of a complete file."""

from __future__ import annotations

import base64
import datetime
import errno
import hashlib
import io
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from fastapi.testclient import TestClient
from servers import postgresql_database
from service_helpers import Server, assert_problem, wait_until
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError

from service.database import now
from service.errors import ServiceError
from service.resumable.headers import Metadata
from service.resumable.models import ResumableUploadRow
from service.resumable.repository import reserved_bytes
from service.services import Services
from service.settings import Settings
from service.tenants.models import TenantRow
from service.uploads.assembling import Assembly, ResumedFile, assemble
from service.uploads.kinds import UploadKind
from service.worker import kernel

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}
CONTENT = bytes(range(256)) * 40
ADDRESS = "/v1/uploads/tus"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def metadata(**values: str) -> dict[str, str]:
    pairs = (f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())
    return {"Upload-Metadata": ",".join(pairs)}


def begin(client: httpx.Client, size: int = len(CONTENT), **values: str) -> str:
    """Begin an upload; its path."""
    headers = {**TUS, "Upload-Length": str(size), **(metadata(**values) if values else {})}
    answer = client.post(ADDRESS, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.headers["Location"]


def send(client: httpx.Client, path: str, content: bytes, offset: int = 0, **headers: str) -> httpx.Response:
    return client.patch(path, content=content, headers={**PIECE, "Upload-Offset": str(offset), **headers})


def offset_of(client: httpx.Client, path: str) -> int:
    answer = client.head(path, headers=TUS)
    assert answer.status_code == 200, answer.headers
    return int(answer.headers["Upload-Offset"])


def partial(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data/partial").iterdir())


# The protocol.


def test_what_the_server_can_do_is_told_to_any_version(client: TestClient) -> None:
    answer = client.options(ADDRESS)
    assert answer.status_code == 204
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert answer.headers["Tus-Max-Size"] == str(4 << 30)
    assert set(answer.headers["Tus-Extension"].split(",")) == {
        "creation",
        "creation-with-upload",
        "expiration",
        "checksum",
        "termination",
    }
    assert "sha1" in answer.headers["Tus-Checksum-Algorithm"].split(",")


def test_a_file_arrives_in_pieces(client: TestClient, tmp_path: Path) -> None:
    path = begin(client, kind="models", filename="my model.onnx")
    assert path.startswith(f"{ADDRESS}/")
    assert offset_of(client, path) == 0
    for start in range(0, len(CONTENT), 3000):
        answer = send(client, path, CONTENT[start : start + 3000], start)
        assert answer.status_code == 204
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        assert int(answer.headers["Upload-Offset"]) == min(start + 3000, len(CONTENT))
    assert answer.headers["Link"] == f'</v1/models/{sha256(CONTENT)}>; rel="related"'
    assert client.get(f"/v1/models/{sha256(CONTENT)}").json()["files"][0]["name"] == "model.onnx"
    head = client.head(path, headers=TUS)
    assert head.headers["Upload-Offset"] == head.headers["Upload-Length"] == str(len(CONTENT))
    assert (
        head.headers["Upload-Metadata"]
        == metadata(kind="models", filename="my model.onnx")["Upload-Metadata"]
    )
    assert head.headers["Cache-Control"] == "no-store"
    assert partial(tmp_path) == []


def test_the_first_piece_may_come_with_the_beginning(client: TestClient) -> None:
    headers = {**PIECE, "Upload-Length": str(len(CONTENT)), **metadata(kind="datasets")}
    answer = client.post(ADDRESS, headers=headers, content=CONTENT[:100])
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (201, "100")
    assert send(client, answer.headers["Location"], CONTENT[100:], 100).status_code == 204
    assert client.get(f"/v1/datasets/{sha256(CONTENT)}").status_code == 200
    answer = client.post(ADDRESS, headers=headers, content=CONTENT)
    assert answer.headers["Upload-Offset"] == str(len(CONTENT))
    assert "Link" in answer.headers


@pytest.mark.parametrize("method", ["POST", "HEAD", "PATCH", "DELETE"])
def test_a_version_that_is_not_spoken_is_refused(client: TestClient, method: str) -> None:
    path = ADDRESS if method == "POST" else begin(client)
    for headers in ({}, {"Tus-Resumable": "0.2.2"}):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 412
        assert answer.headers["Tus-Version"] == answer.headers["Tus-Resumable"] == "1.0.0"
        if method != "HEAD":
            assert_problem(answer, 412, "tus_version_unsupported")


@pytest.mark.parametrize(
    ("headers", "status", "code", "field"),
    [
        ({}, 422, "request_invalid", "Upload-Length"),
        ({"Upload-Defer-Length": "1"}, 422, "request_invalid", "Upload-Length"),
        ({"Upload-Length": "-1"}, 422, "request_invalid", "Upload-Length"),
        ({"Upload-Length": "9" * 30}, 422, "request_invalid", "Upload-Length"),
        ({"Upload-Length": "0"}, 422, "upload_empty", "Upload-Length"),
        ({"Upload-Length": str((4 << 30) + 1)}, 413, "request_too_large", "Upload-Length"),
        ({"Upload-Length": "1", "Upload-Metadata": "kind ???"}, 422, "request_invalid", "Upload-Metadata"),
        (
            {"Upload-Length": "1", "Upload-Metadata": "a YQ==,a YQ=="},
            422,
            "request_invalid",
            "Upload-Metadata",
        ),
        ({"Upload-Length": "1", **metadata(kind="x")}, 422, "request_invalid", "Upload-Metadata"),
        ({"Upload-Length": "1", **metadata(sha256="x")}, 422, "request_invalid", "Upload-Metadata"),
        ({"Upload-Length": "1", **metadata(a="x" * 5000)}, 422, "request_invalid", "Upload-Metadata"),
    ],
)
def test_a_beginning_that_is_not_valid_is_refused(
    client: TestClient, headers: dict[str, str], status: int, code: str, field: str
) -> None:
    answer = client.post(ADDRESS, headers={**TUS, **headers})
    assert assert_problem(answer, status, code)["field"] == field
    assert answer.headers["Tus-Resumable"] == "1.0.0"


def test_metadata_may_have_keys_without_values(client: TestClient) -> None:
    text = "is_confidential,filename d29ybGRfZG9taW5hdGlvbl9wbGFuLnBkZg=="
    answer = client.post(ADDRESS, headers={**TUS, "Upload-Length": "1", "Upload-Metadata": text})
    assert client.head(answer.headers["Location"], headers=TUS).headers["Upload-Metadata"] == text


def test_an_offset_other_than_the_uploads_is_refused(client: TestClient) -> None:
    path = begin(client)
    send(client, path, CONTENT[:10])
    for offset in (0, 9, 11):
        answer = send(client, path, CONTENT[10:20], offset)
        assert_problem(answer, 409, "upload_offset_mismatch")
        assert answer.headers["Upload-Offset"] == "10"
    assert offset_of(client, path) == 10


def test_a_piece_of_another_type_is_refused(client: TestClient) -> None:
    path = begin(client)
    headers = {**TUS, "Upload-Offset": "0", "Content-Type": "application/octet-stream"}
    assert_problem(client.patch(path, content=b"x", headers=headers), 415, "media_type_unsupported")
    assert_problem(client.patch(path, content=b"x", headers=PIECE), 422, "request_invalid")


def test_more_than_the_announced_size_is_refused_and_leaves_no_trace(client: TestClient) -> None:
    path = begin(client, size=100, kind="models")
    send(client, path, CONTENT[:10])

    def unannounced() -> Iterator[bytes]:
        yield CONTENT[10:100]
        yield b"more"

    assert_problem(send(client, path, CONTENT[10:101], 10), 413, "request_too_large")
    assert_problem(send(client, path, unannounced(), 10), 413, "request_too_large")  # type: ignore[arg-type]
    assert offset_of(client, path) == 10
    assert "Link" in send(client, path, CONTENT[10:100], 10).headers
    assert client.get(f"/v1/models/{sha256(CONTENT[:100])}").status_code == 200


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_a_piece_is_kept_only_if_its_checksum_matches(client: TestClient, algorithm: str) -> None:
    path = begin(client, kind="models")
    good, bad = (
        f"{algorithm} {base64.b64encode(hashlib.new(algorithm, content).digest()).decode()}"
        for content in (CONTENT[:5000], b"")
    )
    answer = send(client, path, CONTENT[:5000], **{"Upload-Checksum": bad})
    assert_problem(answer, 460, "checksum_mismatch")
    assert offset_of(client, path) == 0
    assert send(client, path, CONTENT[:5000], **{"Upload-Checksum": good}).status_code == 204
    for value in ("md5 AAAA", "sha1 ???", ""):
        answer = send(client, path, CONTENT[5000:], 5000, **{"Upload-Checksum": value})
        assert_problem(answer, 422, "request_invalid")
    # The digest of the whole is right although a piece was taken back.
    assert send(client, path, CONTENT[5000:], 5000).status_code == 204
    assert client.get(f"/v1/models/{sha256(CONTENT)}").status_code == 200


def test_a_piece_with_a_checksum_is_dropped_when_the_disk_is_full_in_its_middle(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3 << 20)
    checksum = f"sha256 {base64.b64encode(hashlib.sha256(content).digest()).decode()}"
    room_for = iter([True])

    def require(place: int, reserved: int, needed: int) -> None:
        if not next(room_for, False):
            raise OSError(errno.ENOSPC, "No space left on device")

    path = begin(client, len(content), kind="datasets")
    with monkeypatch.context() as patch:
        patch.setattr("service.storage.room.require", require)
        answer = send(client, path, content, **{"Upload-Checksum": checksum})
    assert_problem(answer, 507, "storage_full")
    assert offset_of(client, path) == 0
    assert send(client, path, content, **{"Upload-Checksum": checksum}).status_code == 204


def test_an_upload_that_was_ended_is_gone(client: TestClient, tmp_path: Path) -> None:
    path = begin(client)
    send(client, path, CONTENT[:10])
    assert client.delete(path, headers=TUS).status_code == 204
    assert_problem(send(client, path, b"x", 10), 404, "upload_not_found")
    assert client.head(path, headers=TUS).status_code == 404
    assert_problem(client.delete(path, headers=TUS), 404, "upload_not_found")
    assert partial(tmp_path) == []


def test_what_was_stored_from_an_upload_outlives_it(client: TestClient, tmp_path: Path) -> None:
    path = begin(client, kind="models")
    send(client, path, CONTENT)
    assert client.delete(path, headers=TUS).status_code == 204
    assert client.get(f"/v1/models/{sha256(CONTENT)}").status_code == 200
    assert partial(tmp_path) == []


def test_the_method_may_be_named_by_a_header(client: TestClient) -> None:
    path = begin(client)
    headers = {**PIECE, "Upload-Offset": "0", "X-HTTP-Method-Override": "PATCH"}
    assert client.post(path, content=CONTENT[:7], headers=headers).headers["Upload-Offset"] == "7"
    assert client.post(path, headers={**TUS, "X-HTTP-Method-Override": "DELETE"}).status_code == 204
    for headers in (TUS, {**TUS, "X-HTTP-Method-Override": "PUT"}):
        answer = client.post(path, headers=headers)
        assert_problem(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"] == "DELETE, HEAD, PATCH"


def test_a_content_that_is_not_the_announced_one_is_not_stored(client: TestClient, tmp_path: Path) -> None:
    path = begin(client, kind="models", sha256=sha256(b"other"))
    assert_problem(send(client, path, CONTENT), 422, "digest_mismatch")
    assert client.head(path, headers=TUS).status_code == 404
    assert client.get(f"/v1/models/{sha256(CONTENT)}").status_code == 404
    assert partial(tmp_path) == []
    path = begin(client, kind="models", sha256=sha256(CONTENT))
    assert send(client, path, CONTENT).status_code == 204


# One at a time.


def open_patch(server: Server, path: str, size: int, sent: bytes, **headers: str) -> socket.socket:
    """A request whose body has not come to its end."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    lines = [f"PATCH {path} HTTP/1.1", "Host: localhost", "Upload-Offset: 0", f"Content-Length: {size}"]
    lines += [f"{name}: {value}" for name, value in {**PIECE, **headers}.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
    return connection


def test_two_requests_for_one_upload_do_not_mix(start_server, tmp_path: Path) -> None:
    server: Server = start_server()
    with server.client() as client:
        path = begin(client, size=100)
        file = tmp_path / "data/partial" / path.rpartition("/")[2]
        with open_patch(server, path, 100, b"") as first:
            wait_until(file.exists)
            wait_until(lambda: send(client, path, b"second").status_code == 423)
            assert_problem(send(client, path, b"second"), 423, "upload_locked")
            assert_problem(client.delete(path, headers=TUS), 423, "upload_locked")
            first.sendall(CONTENT[:100])
            assert b" 204 " in first.recv(100)
        assert offset_of(client, path) == 100
        assert file.read_bytes() == CONTENT[:100]


def test_asking_for_the_offset_ends_a_request_whose_connection_is_dead(start_server, tmp_path: Path) -> None:
    """Its client cannot have sent both: it lost the connection without the server's knowing."""
    server: Server = start_server()
    with server.client() as client:
        content = os.urandom(5_000_000)
        path = begin(client, size=len(content), kind="models")
        file = tmp_path / "data/partial" / path.rpartition("/")[2]
        with open_patch(server, path, len(content), content[:3_000_000]) as dead:
            wait_until(lambda: file.exists() and file.stat().st_size > 1_000_000)
            offset = offset_of(client, path)
            assert offset == file.stat().st_size
            assert b" 400 " in dead.recv(100)
        assert send(client, path, content[offset:], offset).status_code == 204
        assert client.get(f"/v1/models/{sha256(content)}").status_code == 200


# After an interruption.


@pytest.mark.parametrize("checksum", [False, True])
def test_what_arrived_before_the_connection_broke_is_there(
    start_server, tmp_path: Path, checksum: bool
) -> None:
    """Unless it had a checksum, which nothing that is not whole can match."""
    server: Server = start_server()
    content = os.urandom(5_000_000)
    with server.client() as client:
        path = begin(client, size=len(content), kind="models", sha256=sha256(content))
        file = tmp_path / "data/partial" / path.rpartition("/")[2]
        digest = base64.b64encode(hashlib.sha1(content).digest()).decode()
        headers = {"Upload-Checksum": f"sha1 {digest}"} if checksum else {}
        with open_patch(server, path, len(content), content[:3_000_000], **headers):
            wait_until(lambda: file.exists() and file.stat().st_size > 1_000_000)
        offset = offset_of(client, path)
        assert offset == 0 if checksum else 1_000_000 < offset <= 3_000_000
        assert send(client, path, content[offset:], offset).status_code == 204
        assert client.get(f"/v1/models/{sha256(content)}").status_code == 200


# What becomes of complete files.


def upload(client: httpx.Client, content: bytes) -> str:
    """Id of a complete upload that is nothing by itself."""
    path = begin(client, size=len(content))
    answer = send(client, path, content)
    assert answer.status_code == 204
    assert "Link" not in answer.headers
    return path.rpartition("/")[2]


def test_a_model_is_put_together_from_uploads_and_from_content_that_is_there(
    client: TestClient, tmp_path: Path
) -> None:
    client.post("/v1/models", files=[("model", b"old"), ("external_data", ("w", b"weights"))])
    model, more = upload(client, b"model"), upload(client, b"more")
    files = [
        {"name": "model.onnx", "upload": model},
        {"name": "w.bin", "sha256": sha256(b"weights")},
        {"name": "more.bin", "upload": more},
    ]
    answer = client.post("/v1/models", json={"files": files})
    assert answer.status_code == 201, answer.text
    parts = [
        ("model", b"model"),
        ("external_data", ("more.bin", b"more")),
        ("external_data", ("w.bin", b"weights")),
    ]
    same = client.post("/v1/models", files=parts)
    assert (same.status_code, same.json()) == (200, answer.json())
    assert partial(tmp_path) == []
    # The answer may have been lost: the same request again.
    assert client.post("/v1/models", json={"files": files}).status_code == 200


def test_data_sets_and_checkpoints_too(client: TestClient) -> None:
    for collection, name in (("datasets", "data.npz"), ("checkpoints", "checkpoint")):
        identifier = upload(client, collection.encode())
        files = [{"name": name, "upload": identifier}]
        answer = client.post(f"/v1/{collection}", json={"files": files})
        assert answer.json()["id"] == sha256(collection.encode())


def test_files_that_cannot_be_put_together_are_named(client: TestClient) -> None:
    done, begun = upload(client, b"model"), begin(client).rpartition("/")[2]
    model = {"name": "model.onnx", "upload": done}

    def problem(files: object, status: int, code: str, collection: str = "models") -> dict[str, Any]:
        return assert_problem(client.post(f"/v1/{collection}", json={"files": files}), status, code)

    assert problem([{**model, "upload": begun}], 409, "upload_unfinished")["field"] == "files.0.upload"
    assert problem([{**model, "upload": "0" * 32}], 404, "upload_not_found")["field"] == "files.0.upload"
    unknown = {"name": "w", "sha256": "0" * 64}
    assert problem([model, unknown], 404, "content_not_found")["field"] == "files.1.sha256"
    assert problem([{**model, "name": "w"}], 422, "request_invalid")["field"] == "files"
    assert problem(
        [{**model, "name": "data.npz"}, {**model, "name": "w"}], 422, "request_invalid", "datasets"
    )
    assert problem([model, model], 422, "file_name_invalid")["file"] == "model.onnx"
    for name in ("../w", "/etc/passwd", "a/b", "..", "a\\b"):
        assert problem([model, {**model, "name": name}], 422, "external_data_outside")["file"] == name
    for name in ("", "a\0b", "checkpoint", "x" * 300):
        refused = problem([model, {**model, "name": name}], 422, "file_name_invalid")
        assert refused["field"] == "files.1.name"
    problem([], 422, "request_invalid")
    malformed = {"name": "model.onnx", "sha256": "zz"}
    assert problem([malformed], 422, "request_invalid")["field"] == "files.0.sha256"
    assert problem([{**model, "sha256": "0" * 64}], 422, "request_invalid")["field"] == "files.0.upload"
    assert problem([{"name": "model.onnx"}], 422, "request_invalid")["field"] == "files.0.upload"
    assert problem(["model.onnx"], 422, "request_invalid")["field"] == "files.0"
    assert problem([{**model, "upload": "x"}], 422, "request_invalid")["field"] == "files.0.upload"
    problem([{**model, "name": f"w{number}"} for number in range(257)], 413, "request_too_large")
    assert client.post("/v1/models", json={"files": [model]}).status_code == 201


# Tenants, expiry, restarts: the service without HTTP.


@pytest.fixture(params=["sqlite", "postgresql"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    def opened(**settings: str) -> Iterator[Services]:
        services = Services.of(Settings(data_dir=tmp_path / "data", **settings))
        with services.opened():
            with services.database.writing() as session:
                session.add(TenantRow(id="other", name="other"))
            yield services

    if request.param == "sqlite":
        yield from opened()
    else:
        with postgresql_database() as url:
            yield from opened(database_url=url)


def put(services: Services, identifier: str, content: bytes) -> int:
    """Append, as a request does; the offset afterwards."""
    part = services.resumable.open("default", identifier)
    with part.file:
        part.file.write(content)
        if part.digest is not None:
            part.digest.update(content)
        return services.resumable.finish(part).offset


def create(services: Services, size: int = 10, **values: str) -> str:
    text = metadata(**values)["Upload-Metadata"] if values else ""
    return services.resumable.create("default", size, Metadata.parse(text)).id


def expire(services: Services, identifier: str) -> None:
    with services.database.writing() as session:
        session.get_one(ResumableUploadRow, identifier).expires_at = now().replace(year=2020)


def code_of(error: pytest.ExceptionInfo[ServiceError]) -> str:
    return error.value.cause.code


def test_another_tenants_upload_is_not_there(services: Services) -> None:
    identifier = create(services, 3)
    put(services, identifier, b"abc")
    for call in (
        lambda: services.resumable.open("other", identifier),
        lambda: services.resumable.remove("other", identifier),
        lambda: services.resumable.give("other", identifier, services.data.staging / "x", "f"),
    ):
        with pytest.raises(ServiceError) as error:
            call()
        assert code_of(error) == "upload_not_found"


def test_another_tenants_content_cannot_be_had_by_its_digest(services: Services) -> None:
    identifier = create(services, 3, kind="models")
    put(services, identifier, b"abc")
    assert services.uploads.content_bytes("default", sha256(b"abc"), "f") == 3
    with pytest.raises(ServiceError) as error:
        services.uploads.content_bytes("other", sha256(b"abc"), "f")
    assert code_of(error) == "content_not_found"


def test_what_has_expired_says_so_and_is_removed(services: Services) -> None:
    old, young = create(services), create(services)
    put(services, old, b"abc")
    put(services, young, b"abc")
    (services.data.partial / ("0" * 32)).write_bytes(b"a crash left it")
    expire(services, old)
    with pytest.raises(ServiceError) as error:
        services.resumable.open("default", old)
    assert code_of(error) == "upload_expired"
    assert services.resumable.remove_expired() == 2
    assert [path.name for path in services.data.partial.iterdir()] == [young]
    with pytest.raises(ServiceError) as error:
        services.resumable.open("default", old)
    assert code_of(error) == "upload_not_found"
    assert put(services, young, b"d") == 4


def test_what_is_being_received_does_not_expire(services: Services) -> None:
    identifier = create(services)
    part = services.resumable.open("default", identifier)
    with part.file:
        expire(services, identifier)
        assert services.resumable.remove_expired() == 0
        part.file.write(b"abc")
        services.resumable.finish(part)
    assert services.resumable.remove_expired() == 0
    assert put(services, identifier, b"") == 3


def test_an_upload_is_counted_until_a_stored_one_has_its_content(services: Services) -> None:
    first, second = create(services, 10), create(services, 3, kind="models")
    with services.database.reading() as session:
        assert reserved_bytes(session, "default") == 13
    put(services, second, b"abc")
    with services.database.reading() as session:
        assert reserved_bytes(session, "default") == 10
        assert reserved_bytes(session, "other") == 0
    services.resumable.remove("default", first)
    with services.database.reading() as session:
        assert reserved_bytes(session, "default") == 0


def test_a_quota_counts_what_is_on_its_way_and_counts_it_once(services: Services) -> None:
    services.tenants.set_quotas("default", {"max_bytes": 10})
    first = create(services, 7, kind="models")
    with pytest.raises(ServiceError) as error:
        create(services, 4)
    assert code_of(error) == "storage_quota_exceeded"
    second = create(services, 3)
    assert put(services, first, b"abcdefg") == 7
    assert put(services, second, b"abc") == 3
    with services.data.staged() as directory:
        file = ResumedFile(name="data.npz", upload=second)
        assemble(
            services.uploads,
            services.resumable,
            "default",
            UploadKind.DATASET,
            Assembly(files=[file]),
            directory,
        )
    with pytest.raises(ServiceError) as error:
        create(services, 1)
    assert code_of(error) == "storage_quota_exceeded"


def test_another_process_goes_on_and_knows_the_digest(services: Services) -> None:
    identifier = create(services, 6, kind="models", sha256=sha256(b"abcdef"))
    put(services, identifier, b"abc")
    other = Services.of(services.settings)
    assert put(other, identifier, b"d") == 4
    assert put(services, identifier, b"ef") == 6  # what this one remembers of it is outdated
    assert services.store.exists(f"blobs/{sha256(b'abcdef')[:2]}/{sha256(b'abcdef')}")
    other.database.close()


def test_a_crash_after_the_last_byte_is_made_good_by_asking(services: Services) -> None:
    identifier = create(services, 3, kind="models")
    (services.data.partial / identifier).write_bytes(b"abc")
    part = services.resumable.open("default", identifier)
    with part.file:
        assert services.resumable.finish(part).stored_as == "models"
    assert services.uploads.content_bytes("default", sha256(b"abc"), "f") == 3


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_upload_whose_storing_failed_at_the_last_is_not_stuck(
    services: Services, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """The store has made the file read-only by then, and the service need not be root."""
    identifier, other = create(services, 3, kind="models"), create(services, 3)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr("service.resumable.service.give_over", fail)
        put(services, identifier, b"abc")

    def go_on() -> None:
        part = services.resumable.open("default", identifier)
        with part.file:
            part.take_back()  # of nothing
            assert services.resumable.finish(part).stored_as == "models"

    if goes_on:
        without_capabilities(go_on)
        assert services.uploads.content_bytes("default", sha256(b"abc"), "f") == 3
    else:
        expire(services, identifier)
        expire(services, other)
        assert without_capabilities(services.resumable.remove_expired) == 2


def fail(*arguments: Any) -> None:
    raise OSError("gone")


def without_capabilities(call: Callable[[], Any]) -> Any:
    """What comes of a call in a thread that has no more rights than the owner of its files."""

    def run() -> Any:
        number = {"x86_64": 126, "aarch64": 91}[os.uname().machine]  # capset, of this thread
        kernel.syscall(number, struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6))
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def test_the_last_piece_too_puts_the_expiry_off(services: Services) -> None:
    identifier = create(services, 3)
    with services.database.writing() as session:
        session.get_one(ResumableUploadRow, identifier).expires_at = now() + datetime.timedelta(seconds=60)
    put(services, identifier, b"abc")
    with services.database.reading() as session:
        left = session.get_one(ResumableUploadRow, identifier).expires_at - now()
    assert left > datetime.timedelta(minutes=5)


def test_content_that_was_removed_meanwhile_is_said_to_be_gone(services: Services) -> None:
    identifier = create(services, 3, kind="models")
    put(services, identifier, b"abc")
    services.store.delete(f"blobs/{sha256(b'abc')[:2]}/{sha256(b'abc')}")
    with services.data.staged() as directory:
        (directory / "models").mkdir()
        target = directory / "models/w"
        services.resumable.give("default", identifier, target, "f")
        assert not target.exists()


# With a client that others wrote.


def test_an_independent_client_goes_on_after_the_server_was_killed(
    start_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tuspy (https://github.com/tus/tus-py-client), interrupted in the middle of a piece."""
    server: Server = start_server()
    content = os.urandom(20_000_000)
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    client = TusClient(f"{server.url}{ADDRESS}")
    uploader = client.uploader(
        str(file),
        chunk_size=2_000_000,
        metadata={"kind": "models", "sha256": sha256(content)},
        upload_checksum=True,
    )
    for _ in range(3):
        uploader.upload_chunk()

    class Interrupted(io.BytesIO):
        """A piece: when most of it has been read, to be sent, and some has arrived, the server is killed."""

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 1_500_000 and server.process.poll() is None:
                (received,) = (tmp_path / "data/partial").iterdir()
                wait_until(lambda: received.stat().st_size > 6_000_000)
                server.stop(signal.SIGKILL)
            return super().read(size)

    patch = requests.patch
    monkeypatch.setattr(
        requests, "patch", lambda url, data, **more: patch(url, data=Interrupted(data), **more)
    )
    with pytest.raises(TusCommunicationError):
        uploader.upload()
    monkeypatch.undo()
    assert server.process.returncode == -signal.SIGKILL
    server.start()

    again = client.uploader(str(file), chunk_size=2_000_000, url=uploader.url, upload_checksum=True)
    assert 6_000_000 <= again.offset < len(content)
    again.upload()
    assert again.offset == len(content)
    answer = httpx.get(f"{server.url}/v1/models/{sha256(content)}", timeout=60)
    assert answer.json()["bytes"] == len(content)
    blob = tmp_path / "data/blobs" / sha256(content)[:2] / sha256(content)
    assert blob.read_bytes() == content
    assert partial(tmp_path) == []
