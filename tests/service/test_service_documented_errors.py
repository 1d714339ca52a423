"""Every error that the OpenAPI document names for an operation is one that the operation can answer with.

The other half, that it answers with no other, is looked at with every answer of the tests: see `conftest.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service_helpers import DOCUMENTED, FAKE_WORKER, assert_problem, submit, wait_for
from sqlalchemy.exc import OperationalError

from service.app import create_app
from service.database import Database, now
from service.jobs import repository as jobs
from service.resumable.headers import Metadata
from service.resumable.models import ResumableUploadRow
from service.services import Services
from service.settings import Settings
from service.storage.local import LocalStore
from service.storage.store import StoreUnavailableError
from service.uploads import body
from service.webhooks.signing import new_secret
from service.worker import process

UNKNOWN_UPLOAD = "0" * 64
UNKNOWN_JOB = "0" * 32
MODEL_FIELDS = {"/v1/models": "model", "/v1/datasets": "dataset", "/v1/checkpoints": "checkpoint"}

# test_service_resumable_errors.py has these.
RESUMABLE = "/v1/uploads/tus"

# What every operation documents, and these answer otherwise: one uses nothing that could fail so, the other
# says of it that the service is not ready.
UNPROVOKED = {
    ("GET /health/live", "internal_error"),
    ("GET /health/live", "database_unavailable"),
    ("GET /health/ready", "database_unavailable"),
    ("GET /metrics", "database_unavailable"),
}


@dataclass
class Situation:
    """A service with some jobs, an operation of it, and the means to break things for a moment."""

    client: TestClient
    locked: TestClient
    """The same, but for those with keys."""
    patch: pytest.MonkeyPatch
    succeeded: str
    finalized: str
    cancelled: str
    operation: str = ""

    @property
    def path(self) -> str:
        return self.operation.partition(" ")[2]

    def call(self, *, job: str = UNKNOWN_JOB, upload: str = UNKNOWN_UPLOAD, **options: Any) -> httpx.Response:
        """Call the operation; without a body of its own where it needs one, with one that is in order."""
        path = self.path.format(
            job_id=job,
            upload_id=upload,
            name=options.pop("name", "manifest.json"),
            delivery_id=UNKNOWN_JOB,
        )
        method = self.operation.partition(" ")[0]
        if method == "POST" and not {"content", "json", "files"} & options.keys():
            options |= self._body()
        return options.pop("client", self.client).request(method, path, **options)

    def _body(self) -> dict[str, Any]:
        if self.path == "/v1/jobs":
            return {"json": {"kind": "finalize", "prepare_job": self.succeeded}}
        return {} if "{" in self.path else self.form()

    def form(self, content: bytes = b"{}", *more: Any) -> dict[str, Any]:
        return {"files": [(MODEL_FIELDS.get(self.path, "model"), content), *more]}

    def recipe(self, recipe: dict[str, Any]) -> httpx.Response:
        if self.path == "/v1/jobs":
            return self.call(json={"kind": "prepare", "model": UNKNOWN_UPLOAD, "recipe": recipe})
        if self.path.endswith("/retry"):  # of a job that another version took
            job = submit(self.client, {"seconds": 600, "unique": os.urandom(8).hex()})
            self.client.post(f"/v1/jobs/{job}/cancel")
            with self.client.app.state.services.database.writing() as session:  # type: ignore[attr-defined]
                row = jobs.get(session, job)
                assert row is not None
                row.request = {**row.request, "recipe": recipe}
            return self.call(job=job)
        return self.call(**self.form(), data={"recipe": json.dumps(recipe)})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Situation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "COMMAND", FAKE_WORKER)
        app = create_app(Settings(data_dir=tmp_path_factory.mktemp("service") / "data", log_level="error"))
        locked = Settings(data_dir=tmp_path_factory.mktemp("locked") / "data", log_level="error", auth="keys")
        with (
            TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client,
            TestClient(create_app(locked)) as locked_client,
        ):
            prepared = submit(client, {})
            wait_for(client, prepared)
            request = {"kind": "finalize", "prepare_job": prepared}
            finalized = client.post("/v1/jobs", json=request).json()["id"]
            wait_for(client, finalized)
            cancelled = submit(client, {"seconds": 600})
            client.post(f"/v1/jobs/{cancelled}/cancel")
            yield Situation(client, locked_client, patch, prepared, finalized, cancelled)


@pytest.fixture
def situation(service: Situation, monkeypatch: pytest.MonkeyPatch) -> Situation:
    service.patch = monkeypatch
    return service


def invalid(s: Situation) -> httpx.Response:
    if "{" in s.path:
        return s.call(job="x", upload="x")
    if s.operation == "GET /v1/jobs":
        return s.call(params={"limit": 0})
    return s.call(json={}) if s.path == "/v1/jobs" else s.call(files={"nonsense": b"x"})


def too_large(s: Situation) -> httpx.Response:
    return s.call(**s._body(), headers={"content-length": str(1 << 50)})


def aborted(s: Situation) -> httpx.Response:
    async def disconnect() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    return answer_to(s, disconnect)


def timed_out(s: Situation) -> httpx.Response:
    paced = body._paced
    s.patch.setattr(body, "_paced", lambda request, seconds, turn: paced(request, 0.01, turn))
    return answer_to(s, anyio.sleep_forever)


def answer_to(s: Situation, receive: Callable[[], Any]) -> httpx.Response:
    """Without a client that could read it, the answer is taken from the application itself."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        media_type = b"application/json" if s.path == "/v1/jobs" else b"multipart/form-data; boundary=b"
        headers = [(b"host", b"localhost"), (b"content-type", media_type)]
        app: Any = s.client.app
        await app(
            {
                "type": "http",
                "http_version": "1.1",
                "method": "POST",
                "path": s.path,
                "raw_path": s.path.encode(),
                "root_path": "",
                "scheme": "http",
                "query_string": b"",
                "headers": headers,
                "client": None,
                "server": ("service", 80),
            },
            receive,
            send,
        )

    anyio.run(run)
    start, content = sent
    return httpx.Response(start["status"], headers=start["headers"], content=content["body"])


def full(s: Situation) -> httpx.Response:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    s.patch.setattr(os, "fsync", fail)
    return s.call(**s.form(os.urandom(8)))


def without_database(s: Situation) -> httpx.Response:
    def fail(self: Database) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    s.patch.setattr(Database, "reading", fail)
    s.patch.setattr(Database, "writing", fail)
    return s.call()


def without_store(s: Situation) -> httpx.Response:
    def fail(self: LocalStore, *arguments: Any) -> Any:
        raise StoreUnavailableError("gone")

    s.patch.setattr(LocalStore, "put", fail)
    s.patch.setattr(LocalStore, "read", fail)
    if s.operation.startswith("GET"):
        return s.call(job=s.succeeded)
    return s.call(**s.form(os.urandom(8)))


def broken(s: Situation) -> httpx.Response:
    app = s.client.app
    assert isinstance(app, FastAPI)
    services, app.state.services = app.state.services, SimpleNamespace()
    try:
        return s.call()
    finally:
        app.state.services = services


def without_workers(s: Situation) -> httpx.Response:
    supervisor = s.client.app.state.services.supervisor  # type: ignore[attr-defined]
    s.patch.setattr(type(supervisor), "is_alive", lambda self: False)
    return s.call()


def key_reused(s: Situation) -> httpx.Response:
    headers = {"Idempotency-Key": f"reused at {s.path}"}
    if s.path.endswith("/retry"):
        with busy(s):
            jobs = [queue_with(s, "models")["id"] for _ in range(2)]
            for job in jobs:
                s.client.post(f"/v1/jobs/{job}/cancel")
            answers = [s.call(job=job, headers=headers) for job in jobs]
            s.client.post(f"/v1/jobs/{answers[0].json()['id']}/cancel")
        return answers[-1]
    s.call(headers=headers)
    if s.path == "/v1/jobs":
        prepare = {"kind": "prepare", "model": s.client.post("/v1/models", content=b"{}").json()["id"]}
        return s.call(json=prepare, headers=headers)
    return s.call(**s.form(b'{"other": 1}'), headers=headers)


def finalize(s: Situation, **fields: Any) -> httpx.Response:
    return s.call(json={"kind": "finalize", "prepare_job": s.succeeded, **fields})


def unknown_model(s: Situation) -> httpx.Response:
    if s.path.endswith("/retry"):
        return retry_without(s, "models", "model")
    return s.call(json={"kind": "prepare", "model": UNKNOWN_UPLOAD}) if s.path == "/v1/jobs" else s.call()


def unknown_data(s: Situation) -> httpx.Response:
    if s.path.endswith("/retry"):
        return retry_without(s, "datasets", "calibration")
    return finalize(s, verify=UNKNOWN_UPLOAD) if s.path == "/v1/jobs" else s.call()


def unknown_checkpoint(s: Situation) -> httpx.Response:
    if s.path.endswith("/retry"):
        return retry_without(s, "checkpoints", "checkpoint")
    return finalize(s, checkpoint=UNKNOWN_UPLOAD) if s.path == "/v1/jobs" else s.call()


def unknown_job(s: Situation) -> httpx.Response:
    return finalize(s, prepare_job=UNKNOWN_JOB) if s.path == "/v1/jobs" else s.call()


def not_succeeded(s: Situation) -> httpx.Response:
    return finalize(s, prepare_job=s.cancelled) if s.path == "/v1/jobs" else s.call(job=s.cancelled)


def with_key(s: Situation, lifetime: datetime.timedelta | None, revoked: bool = False) -> httpx.Response:
    tenants = s.locked.app.state.services.tenants  # type: ignore[attr-defined]
    described, key = tenants.create_key("default", "", lifetime)
    if revoked:
        tenants.revoke(described.id)
    return s.call(client=s.locked, headers={"Authorization": f"Bearer {key.text}"})


def beyond(s: Situation, quota: str) -> httpx.Response:
    """Refused for a quota: of what would be new to the service."""
    tenants = s.client.app.state.services.tenants  # type: ignore[attr-defined]
    job = submit(s.client, {"seconds": 600, "unique": os.urandom(8).hex()})
    s.client.post(f"/v1/jobs/{job}/cancel")
    tenants.set_quotas("default", {quota: 0})
    try:
        if s.path.endswith("/retry"):
            return s.call(job=job)
        if s.path == "/v1/jobs":
            request = s.client.get(f"/v1/jobs/{job}").json()["request"]
            return s.call(json=request)
        return s.call(**s.form(os.urandom(8)))
    finally:
        tenants.set_quotas("default", {quota: None})


def too_often(s: Situation) -> httpx.Response:
    tenants = s.client.app.state.services.tenants  # type: ignore[attr-defined]
    tenants.set_quotas("default", {"requests_per_minute": 1})
    try:
        s.call()
        return s.call()
    finally:
        tenants.set_quotas("default", {"requests_per_minute": None})


def retry_without(s: Situation, collection: str, field: str) -> httpx.Response:
    """Retry a cancelled job one of whose inputs has been deleted since."""
    with busy(s):
        job = queue_with(s, collection)
        s.client.post(f"/v1/jobs/{job['id']}/cancel")
        s.client.delete(f"/v1/{collection}/{job['request'][field]}").raise_for_status()
        return s.call(job=job["id"])


@contextlib.contextmanager
def busy(s: Situation) -> Iterator[None]:
    """Within the block what is queued stays so."""
    job = submit(s.client, {"seconds": 600, "busy": s.operation})
    wait_for(s.client, job, "running")
    yield
    s.client.post(f"/v1/jobs/{job}/cancel")


def queue_with(s: Situation, collection: str) -> dict[str, Any]:
    """A new job that reads an upload of that collection, and nobody else reads the same."""
    content = os.urandom(8)
    if collection == "checkpoints":
        checkpoint = s.client.post("/v1/checkpoints", content=content).json()["id"]
        finalize = {"kind": "finalize", "prepare_job": s.succeeded, "checkpoint": checkpoint}
        answer = s.client.post("/v1/jobs", json=finalize)
    else:
        files = {"model": json.dumps({"of": content.hex()}).encode(), "calibration": content}
        answer = s.client.post("/v1/prepare", files=files)
    job: dict[str, Any] = answer.json()
    return job


def in_use(s: Situation) -> httpx.Response:
    collection = s.path.split("/")[2]
    field = {"models": "model", "datasets": "calibration", "checkpoints": "checkpoint", "jobs": "prepare_job"}
    with busy(s):
        job = queue_with(s, "checkpoints" if collection == "jobs" else collection)
        needed = job["request"][field[collection]]
        answer = s.call(job=needed, upload=needed)
        s.client.post(f"/v1/jobs/{job['id']}/cancel")
        return answer


def not_finished(s: Situation) -> httpx.Response:
    with busy(s):
        job = queue_with(s, "models")["id"]
        answer = s.call(job=job)
        s.client.post(f"/v1/jobs/{job}/cancel")
        return answer


def hook(s: Situation, **webhook: Any) -> httpx.Response:
    webhook = {"url": "https://receiver.invalid/", **webhook}
    if s.path == "/v1/jobs":
        return finalize(s, webhook=webhook)
    return s.call(**s.form(), data={"webhook": json.dumps(webhook)})


def too_many_hooks(s: Situation) -> httpx.Response:
    """The seventeenth is refused; a retry brings it along to a job that has sixteen."""
    hooks = [{"url": f"https://receiver.invalid/{number}", "secret": new_secret()} for number in range(17)]
    if "{" not in s.path:
        return [hook(s, **each) for each in hooks][-1]
    with busy(s):
        first = submit(s.client, {"do": "fail"}, data={"webhook": json.dumps(hooks[0])})
        s.client.post(f"/v1/jobs/{first}/cancel")
        for each in hooks[1:]:
            second = submit(s.client, {"do": "fail"}, data={"webhook": json.dumps(each)})
        answer = s.call(job=first)
        s.client.post(f"/v1/jobs/{second}/cancel")
        return answer


def crowded(s: Situation) -> httpx.Response:
    services = s.client.app.state.services  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        for _ in range(services.settings.max_uploads_at_once):
            stack.enter_context(services.intake.admitted())
        return s.call()


def followed(s: Situation) -> httpx.Response:
    services = s.client.app.state.services  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        for _ in range(services.settings.max_event_streams):
            stack.enter_context(services.events.admitted("default"))
        return s.call(job=s.succeeded)


def assemble(s: Situation, *, expired: bool = False, **source: str) -> httpx.Response:
    """An upload of one file: of a resumable upload of which nothing has arrived, or of another source."""
    services: Services = s.client.app.state.services  # type: ignore[attr-defined]
    if not source:
        source["upload"] = services.resumable.create("default", 10, Metadata.parse("")).id
    if expired:
        with services.database.writing() as session:
            session.get_one(ResumableUploadRow, source["upload"]).expires_at = now().replace(year=2020)
    names = {"/v1/models": "model.onnx", "/v1/datasets": "data.npz", "/v1/checkpoints": "checkpoint"}
    return s.call(json={"files": [{"name": names[s.path], **source}]})


PROVOKE: dict[str, Callable[[Situation], httpx.Response]] = {
    "unauthorized": lambda s: s.call(client=s.locked),
    "key_invalid": lambda s: s.call(client=s.locked, headers={"Authorization": "Bearer x"}),
    "key_expired": lambda s: with_key(s, datetime.timedelta(0)),
    "key_revoked": lambda s: with_key(s, None, revoked=True),
    "rate_limited": too_often,
    "host_unknown": lambda s: s.call(headers={"host": "attacker.example"}),
    "cross_origin": lambda s: s.call(headers={"origin": "http://attacker.example"}),
    "storage_quota_exceeded": lambda s: beyond(s, "max_bytes"),
    "job_quota_exceeded": lambda s: beyond(s, "max_queued_jobs"),
    "request_invalid": invalid,
    "request_too_large": too_large,
    "media_type_unsupported": lambda s: s.call(content=b"x", headers={"content-type": "text/plain"}),
    "content_encoding_unsupported": lambda s: s.call(**s._body(), headers={"content-encoding": "gzip"}),
    "upload_aborted": aborted,
    "upload_timeout": timed_out,
    "uploads_busy": crowded,
    "event_streams_exceeded": followed,
    "digest_mismatch": lambda s: s.call(**s.form(), headers={"digest": f"sha-256={'A' * 43}="}),
    "upload_unfinished": assemble,
    "upload_expired": lambda s: assemble(s, expired=True),
    "upload_not_found": lambda s: assemble(s, upload="0" * 32),
    "content_not_found": lambda s: assemble(s, sha256="0" * 64),
    "upload_empty": lambda s: s.call(**s.form(b"")),
    "file_name_invalid": lambda s: s.call(**s.form(b"x", ("external_data", ("model.onnx", b"x")))),
    "external_data_outside": lambda s: s.call(**s.form(b"x", ("external_data", ("a/b", b"x")))),
    "storage_full": full,
    "database_unavailable": without_database,
    "store_unavailable": without_store,
    "internal_error": broken,
    "not_ready": without_workers,
    "recipe_invalid": lambda s: s.recipe({"weight_bits": 1}),
    "recipe_unsupported": lambda s: s.recipe({"target": "tensorrt"}),
    "idempotency_key_reused": key_reused,
    "model_not_found": unknown_model,
    "data_not_found": unknown_data,
    "checkpoint_not_found": unknown_checkpoint,
    "job_not_found": unknown_job,
    "job_not_succeeded": not_succeeded,
    "job_finished": lambda s: s.call(job=s.succeeded),
    "file_not_found": lambda s: s.call(job=s.finalized, name="missing"),
    "job_not_retryable": lambda s: s.call(job=s.succeeded),
    "job_not_finished": not_finished,
    "job_in_use": in_use,
    "upload_in_use": in_use,
    "webhook_url_refused": lambda s: hook(s, url="http://127.0.0.1/"),
    "webhook_secret_missing": lambda s: s.call() if s.operation.startswith("GET") else hook(s),
    "webhook_limit_reached": too_many_hooks,
    "delivery_not_found": lambda s: s.call(job=s.succeeded),
    "precondition_failed": lambda s: s.call(job=s.succeeded, headers={"if-match": '"other"'}),
    "range_invalid": lambda s: s.call(job=s.succeeded, headers={"range": "bytes=1000000-"}),
}


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [
        (operation, status, code)
        for operation, codes in DOCUMENTED.items()
        for code, status in codes.items()
        if (operation, code) not in UNPROVOKED and RESUMABLE not in operation
    ],
)
def test_a_documented_error_can_happen(situation: Situation, operation: str, status: int, code: str) -> None:
    assert code in PROVOKE, f"say here how {operation} comes to answer {code}"
    situation.operation = operation
    assert_problem(PROVOKE[code](situation), status, code)


def test_nothing_is_left_out_that_is_not_documented() -> None:
    assert {(operation, code) for operation, codes in DOCUMENTED.items() for code in codes} >= UNPROVOKED
    assert {
        code for operation, codes in DOCUMENTED.items() if RESUMABLE not in operation for code in codes
    } == PROVOKE.keys()
