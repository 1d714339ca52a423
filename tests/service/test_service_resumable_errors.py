"""Every error that the OpenAPI document names for an operation on resumable uploads can happen."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
from fastapi.testclient import TestClient
from service_helpers import DOCUMENTED, assert_problem
from sqlalchemy.exc import OperationalError
from starlette.requests import ClientDisconnect, Request

from service.app import create_app
from service.database import Database, now
from service.resumable import receiving
from service.resumable.headers import Metadata
from service.resumable.models import ResumableUploadRow
from service.services import Services
from service.settings import Settings
from service.storage.local import LocalStore
from service.storage.store import StoreUnavailableError
from service.uploads import body

ADDRESS = "/v1/uploads/tus"
OPERATIONS = {operation: codes for operation, codes in DOCUMENTED.items() if ADDRESS in operation}
CONTENT = b"a model"
# It uses nothing that could fail so.
UNPROVOKED = {(f"OPTIONS {ADDRESS}", "database_unavailable")}
# Refused before any operation is looked at; test_service_documented_errors.py has them.
ACCESS = {
    "unauthorized",
    "key_invalid",
    "key_expired",
    "key_revoked",
    "rate_limited",
    "host_unknown",
    "cross_origin",
}


@dataclass
class Situation:
    """A service, an operation on an upload of which nothing has arrived, and means to break things."""

    client: TestClient
    patch: pytest.MonkeyPatch
    operation: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def services(self) -> Services:
        return self.client.app.state.services  # type: ignore[attr-defined, no-any-return]

    def begin(self, metadata: str = "kind bW9kZWxz") -> str:  # models
        return self.services.resumable.create("default", len(CONTENT), Metadata.parse(metadata)).id

    def call(self, identifier: str | None = None, content: bytes = CONTENT, **headers: str) -> httpx.Response:
        """Call the operation; POST and PATCH bring all of the content."""
        method, _, path = self.operation.partition(" ")
        needed = {"Tus-Resumable": "1.0.0"}
        if method in ("POST", "PATCH"):
            needed |= {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
        if method == "POST":
            needed |= {"Upload-Length": str(len(CONTENT)), "Upload-Metadata": "kind bW9kZWxz"}
        if "{" in path:
            path = path.format(resumable_id=identifier or self.begin())
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        has_body = method in ("POST", "PATCH")
        return self.client.request(
            method, path, headers={**needed, **fields}, content=content if has_body else None
        )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("service") / "data", log_level="error"))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def situation(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Situation:
    return Situation(client, monkeypatch)


def locked(s: Situation) -> httpx.Response:
    s.patch.setattr(receiving, "_RELEASE_SECONDS", 0.0)
    identifier = s.begin()
    with s.services.resumable.open("default", identifier).file:
        return s.call(identifier)


def expired(s: Situation) -> httpx.Response:
    identifier = s.begin()
    with s.services.database.writing() as session:
        session.get_one(ResumableUploadRow, identifier).expires_at = now().replace(year=2020)
    return s.call(identifier)


def complete(s: Situation, metadata: str) -> httpx.Response:
    """An upload all of which has arrived; for HEAD before the call, as after a crash."""
    identifier = s.begin(metadata)
    if s.operation.startswith("HEAD"):
        (s.services.data.partial / identifier).write_bytes(CONTENT)
    return s.call(identifier, Upload_Metadata=metadata)


def mismatch(s: Situation) -> httpx.Response:
    return complete(s, f"sha256 {base64.b64encode(b'0' * 64).decode()}")


def full(s: Situation) -> httpx.Response:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    s.patch.setattr(os, "fdatasync", fail)
    return s.call()


def without_store(s: Situation) -> httpx.Response:
    def fail(self: LocalStore, *arguments: Any) -> Any:
        raise StoreUnavailableError("gone")

    s.patch.setattr(LocalStore, "put", fail)
    s.patch.setattr(LocalStore, "exists", lambda self, key: False)
    return complete(s, "kind bW9kZWxz")


def without_database(s: Situation) -> httpx.Response:
    identifier = s.begin()

    def fail(self: Database) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    s.patch.setattr(Database, "reading", fail)
    s.patch.setattr(Database, "writing", fail)
    return s.call(identifier)


def broken(s: Situation) -> httpx.Response:
    app: Any = s.client.app
    identifier = s.begin()
    services, app.state.services = app.state.services, SimpleNamespace()
    try:
        return s.call(identifier)
    finally:
        app.state.services = services


def busy(s: Situation) -> httpx.Response:
    with contextlib.ExitStack() as stack:
        for _ in range(s.services.settings.max_uploads_at_once):
            stack.enter_context(s.services.intake.admitted())
        return s.call()


def silent(s: Situation) -> httpx.Response:
    paced = body._paced

    def silence(request: Request, seconds: float, turn: object) -> Any:
        request._receive = anyio.sleep_forever  # type: ignore[assignment]
        return paced(request, 0.01, turn)

    s.patch.setattr(body, "_paced", silence)
    return s.call()


def aborted(s: Situation) -> httpx.Response:
    async def disconnect(request: Request, seconds: float, turn: object) -> Any:
        raise ClientDisconnect
        yield

    s.patch.setattr(body, "_paced", disconnect)
    return s.call()


def beyond_quota(s: Situation) -> httpx.Response:
    identifier = s.begin()
    if s.operation.startswith("HEAD"):
        (s.services.data.partial / identifier).write_bytes(CONTENT)
    s.services.tenants.set_quotas("default", {"max_bytes": 0})
    try:
        return s.call(identifier)
    finally:
        s.services.tenants.set_quotas("default", {"max_bytes": None})


PROVOKE: dict[str, Callable[[Situation], httpx.Response]] = {
    "tus_version_unsupported": lambda s: s.call(Tus_Resumable="2.0.0"),
    "request_invalid": lambda s: s.call("x", Upload_Length="x"),
    "upload_not_found": lambda s: s.call("0" * 32),
    "upload_expired": expired,
    "upload_locked": locked,
    "upload_empty": lambda s: s.call(Upload_Length="0"),
    "upload_offset_mismatch": lambda s: s.call(Upload_Offset="1"),
    "checksum_mismatch": lambda s: s.call(Upload_Checksum="sha1 AAAA"),
    "digest_mismatch": mismatch,
    "media_type_unsupported": lambda s: s.call(Content_Type="text/plain"),
    "content_encoding_unsupported": lambda s: s.call(Content_Encoding="gzip"),
    "request_too_large": lambda s: s.call(content=CONTENT + b"x"),
    "upload_aborted": aborted,
    "upload_timeout": silent,
    "uploads_busy": busy,
    "storage_full": full,
    "store_unavailable": without_store,
    "storage_quota_exceeded": beyond_quota,
    "database_unavailable": without_database,
    "internal_error": broken,
}


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [
        (operation, status, code)
        for operation, codes in OPERATIONS.items()
        for code, status in codes.items()
        if (operation, code) not in UNPROVOKED and code not in ACCESS
    ],
)
def test_a_documented_error_can_happen(situation: Situation, operation: str, status: int, code: str) -> None:
    assert code in PROVOKE, f"say here how {operation} comes to answer {code}"
    situation.operation = operation
    answer = PROVOKE[code](situation)
    if operation.startswith("HEAD"):
        assert answer.status_code == status  # the code is in the body, which HEAD has not
    else:
        assert_problem(answer, status, code)
    if code not in ("internal_error", "database_unavailable"):  # these came before the protocol did
        assert answer.headers["Tus-Resumable"] == "1.0.0"


def test_nothing_is_left_out_that_is_not_documented() -> None:
    assert {code for codes in OPERATIONS.values() for code in codes} == PROVOKE.keys() | ACCESS
