"""Tenants: none sees what another has, and none gets more than its quotas, not even all at once."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from servers import postgresql_database
from service_helpers import FAKE_WORKER, assert_problem, submit, wait_for
from sqlalchemy import text

from service import migrations
from service.app import create_app
from service.database import Database
from service.errors import ServiceError
from service.jobs.schemas import PrepareRequest
from service.jobs.service import JobService
from service.migrations.versions import v0006_result_bytes
from service.openapi import render
from service.services import Services
from service.settings import Settings
from service.tenants.schemas import Quotas
from service.uploads.kinds import UploadKind
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile
from service.worker import process

OPENAPI: dict[str, Any] = json.loads(render())
OPERATIONS = [
    (method.upper(), path, operation)
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
    if path.startswith("/v1/")
]
WITH_ID = [(method, path) for method, path, _ in OPERATIONS if "{" in path]


class Tenant:
    """A client with a tenant's key."""

    def __init__(self, client: TestClient, name: str) -> None:
        self._client = client
        self.name = name
        _, key = client.app.state.services.tenants.create_key(name, "", None)
        self._headers = {"Authorization": f"Bearer {key.text}"}

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {**self._headers, **arguments.pop("headers", {})}
        return self._client.request(method, path, headers=headers, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("POST", path, **arguments)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One service for the tests that only look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "COMMAND", FAKE_WORKER)
        settings = Settings(data_dir=tmp_path_factory.mktemp("data"), log_level="warning", auth="keys")
        with TestClient(create_app(settings), base_url="http://localhost") as client:
            for name in ("owner", "stranger"):
                client.app.state.services.tenants.create(name, name, Quotas())
            yield client


@pytest.fixture(scope="module")
def owner(service: TestClient) -> Tenant:
    return Tenant(service, "owner")


@pytest.fixture(scope="module")
def stranger(service: TestClient) -> Tenant:
    return Tenant(service, "stranger")


@pytest.fixture(scope="module")
def owned(owner: Tenant) -> dict[str, str]:
    """An id of the owner's for each parameter of a path; uploads by their collection."""
    ids = {
        collection: owner.post(f"/v1/{collection}", content=b'{"files": {"a": "1"}}').json()["id"]
        for collection in ("models", "datasets", "checkpoints")
    }
    answer = owner.post("/v1/jobs", json={"kind": "prepare", "model": ids["models"]})
    job = answer.json()["id"]
    assert wait_for(owner, job)["state"] == "succeeded"
    begun = owner.post("/v1/uploads/tus", headers={"Upload-Length": "5", **NEEDED["/v1/uploads/tus"]})
    resumable = begun.headers["location"].rpartition("/")[2]
    return {**ids, "job_id": job, "name": "a", "delivery_id": "0" * 32, "resumable_id": resumable}


# Answers carry the request's id.
SAME_REQUEST = {"X-Request-ID": "r"}
# Fields without which a request is refused whatever id it has.
NEEDED = {
    "/v1/uploads/tus": {"Tus-Resumable": "1.0.0"},
    "/v1/uploads/tus/{resumable_id}": {
        "Tus-Resumable": "1.0.0",
        "Content-Type": "application/offset+octet-stream",
        "Upload-Offset": "0",
    },
}
UNKNOWN = {
    **dict.fromkeys(("models", "datasets", "checkpoints"), "0" * 64),
    **dict.fromkeys(("job_id", "delivery_id", "resumable_id"), "0" * 32),
    "name": "a",
}


def fill(path: str, ids: dict[str, str]) -> str:
    """The path with ids for its parameters. A parameter that is new needs an id in `owned` and `UNKNOWN`."""
    for part in path.split("/"):
        if part.startswith("{"):
            parameter = part.strip("{}")
            known = ids[path.split("/")[2]] if parameter == "upload_id" else ids[parameter]
            path = path.replace(part, known)
    return path


@pytest.mark.parametrize(("method", "path"), WITH_ID)
def test_anothers_id_is_answered_exactly_like_an_unknown_one(
    owner: Tenant, stranger: Tenant, owned: dict[str, str], method: str, path: str
) -> None:
    before = owner.get(f"/v1/jobs/{owned['job_id']}").json()
    headers = {**SAME_REQUEST, **NEEDED.get(path, {})}
    answers = [stranger.request(method, fill(path, ids), headers=headers) for ids in (owned, UNKNOWN)]
    assert [answer.status_code for answer in answers] == [404, 404]
    if method != "HEAD":
        assert_problem(answers[0], 404, answers[1].json()["code"])
    assert answers[0].content == answers[1].content
    assert answers[0].headers == answers[1].headers

    # It is the tenant that makes the difference, and nothing happened to what the owner has.
    assert owner.get(f"/v1/jobs/{owned['job_id']}").json() == before
    if method in ("GET", "HEAD"):
        assert owner.request(method, fill(path, owned), headers=headers).status_code == 200


def test_the_routes_with_an_id_are_found() -> None:
    assert ("GET", "/v1/jobs/{job_id}/events") in WITH_ID
    assert ("POST", "/v1/jobs/{job_id}/cancel") in WITH_ID
    assert ("GET", "/v1/models/{upload_id}") in WITH_ID


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_operation_asks_for_a_key_and_says_so(
    service: TestClient, method: str, path: str, operation: dict[str, Any]
) -> None:
    answer = service.request(method, fill(path, UNKNOWN))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="onnx-qat"')
    if method != "HEAD":
        assert_problem(answer, 401, "unauthorized")
    assert operation["security"] == [{"ApiKey": []}]
    assert "`key_expired`" in operation["responses"]["401"]["description"]
    assert "`rate_limited`" in operation["responses"]["429"]["description"]


def test_the_scheme_is_in_the_document() -> None:
    scheme = OPENAPI["components"]["securitySchemes"]["ApiKey"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in OPENAPI["paths"].items():
        if path.startswith("/health/"):
            assert all("security" not in operation for operation in methods.values())


@pytest.mark.parametrize(
    ("request_of", "code"),
    [
        (lambda ids: {"kind": "prepare", "model": ids["models"]}, "model_not_found"),
        (lambda ids: {"kind": "finalize", "prepare_job": ids["job_id"]}, "job_not_found"),
    ],
)
def test_anothers_ids_are_unknown_in_requests_too(
    stranger: Tenant, owned: dict[str, str], request_of: Callable[[dict[str, str]], Any], code: str
) -> None:
    answers = [
        stranger.post("/v1/jobs", json=request_of(ids), headers=SAME_REQUEST) for ids in (owned, UNKNOWN)
    ]
    assert_problem(answers[0], 404, code)
    assert answers[0].json() == answers[1].json()


def test_lists_show_ones_own_only(owner: Tenant, stranger: Tenant, owned: dict[str, str]) -> None:
    assert owned["job_id"] in [job["id"] for job in owner.get("/v1/jobs").json()["items"]]
    assert stranger.get("/v1/jobs").json() == {"items": [], "next": None}


def test_content_that_another_has_looks_new(start_client: Callable[..., TestClient]) -> None:
    """Or else anybody could ask whether somebody has a certain file."""
    client = start_client(auth="keys")
    client.app.state.services.tenants.create("other", "", Quotas())
    first, second = Tenant(client, "default"), Tenant(client, "other")
    answers = [tenant.post("/v1/models", content=b"model") for tenant in (first, second, second)]
    assert [answer.status_code for answer in answers] == [201, 201, 200]
    jobs = []
    for tenant in (first, second):
        request = {"kind": "prepare", "model": answers[0].json()["id"]}
        answer = tenant.post("/v1/jobs", json=request, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 202
        jobs.append(answer.json()["id"])
    assert jobs[0] != jobs[1]


def test_a_tenant_is_told_what_it_has(start_client: Callable[..., TestClient]) -> None:
    client = start_client(auth="keys")
    client.app.state.services.tenants.create(
        "team-a", "Team A", Quotas(max_bytes=1000, max_queued_jobs=5, requests_per_minute=10_000)
    )
    tenant = Tenant(client, "team-a")
    script = {"files": {"a": "12345"}}
    job = wait_for(tenant, submit(tenant, script))
    status = tenant.get("/v1/tenant").json()
    result = job["bundle"]["bytes"] + sum(file["bytes"] for file in job["files"])
    assert status == {
        "id": "team-a",
        "name": "Team A",
        "key": client.app.state.services.tenants.api_keys("team-a")[0].id,
        "stored_bytes": {"used": len(json.dumps(script)) + result, "limit": 1000},
        "unfinished_jobs": {"used": 0, "limit": 5},
        "requests_per_minute": 10_000,
    }


def test_in_open_mode_the_tenant_is_the_default_one(client: TestClient) -> None:
    assert client.get("/v1/tenant").json() == {
        "id": "default",
        "name": "default",
        "key": None,
        "stored_bytes": {"used": 0, "limit": None},
        "unfinished_jobs": {"used": 0, "limit": None},
        "requests_per_minute": None,
    }


# Quotas.


def test_uploads_are_refused_beyond_the_quota(client: TestClient, tmp_path: Path) -> None:
    services: Services = client.app.state.services
    services.tenants.set_quotas("default", {"max_bytes": 100})
    assert client.post("/v1/models", content=b"a" * 60).status_code == 201
    refused = client.post("/v1/models", content=b"b" * 41)
    problem = assert_problem(refused, 403, "storage_quota_exceeded")
    assert problem["detail"] == "The upload has 41 bytes; 60 of your 100 are used."
    # What is there already takes no more room, and nothing is left of what was refused.
    assert client.post("/v1/models", content=b"a" * 60).status_code == 200
    assert client.post("/v1/datasets", content=b"c" * 40).status_code == 201
    for content, there in ((b"a" * 60, True), (b"b" * 41, False)):
        found = list(tmp_path.rglob(f"*{hashlib.sha256(content).hexdigest()}*"))
        assert bool(found) == there
    assert list((tmp_path / "data/staging").iterdir()) == []
    assert_problem(client.post("/v1/datasets", content=b"d"), 403, "storage_quota_exceeded")
    services.tenants.set_quotas("default", {"max_bytes": None})
    assert client.post("/v1/datasets", content=b"d").status_code == 201


def test_results_count_and_fail_no_job(client: TestClient) -> None:
    services: Services = client.app.state.services
    services.tenants.set_quotas("default", {"max_bytes": 600})
    job = wait_for(client, submit(client, {"files": {"a": "x" * 500}}))
    assert job["state"] == "succeeded"
    assert_problem(client.post("/v1/models", content=b"m"), 403, "storage_quota_exceeded")
    request = {"kind": "prepare", "model": job["request"]["model"], "recipe": {"weight_bits": 4}}
    assert_problem(client.post("/v1/jobs", json=request), 403, "storage_quota_exceeded")


def test_jobs_are_refused_beyond_the_quota_until_one_has_ended(client: TestClient) -> None:
    services: Services = client.app.state.services
    services.tenants.set_quotas("default", {"max_queued_jobs": 2})
    jobs = [submit(client, {"seconds": 60, "number": number}) for number in range(2)]
    refused = client.post("/v1/prepare", files={"model": b'{"number": 3}'})
    assert_problem(refused, 429, "job_quota_exceeded")
    assert refused.headers["retry-after"] == "10"
    # The same work again is no other job.
    assert submit(client, {"seconds": 60, "number": 1}) == jobs[1]
    client.post(f"/v1/jobs/{jobs[0]}/cancel")
    third = submit(client, {"number": 3})
    for job in jobs:
        client.post(f"/v1/jobs/{job}/cancel")
    assert wait_for(client, third)["state"] == "succeeded"


@pytest.fixture(params=["sqlite", "postgresql"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    """The service's parts on each database, without workers."""
    if request.param == "sqlite":
        services = Services.of(Settings(data_dir=tmp_path / "data"))
        with services.opened():
            yield services
        return
    with postgresql_database() as url:
        services = Services.of(Settings(data_dir=tmp_path / "data", database_url=url))
        with services.opened():
            yield services


def store(services: Services, content: bytes) -> str:
    with services.data.staged() as directory:
        (directory / "models").mkdir()
        (directory / "models/model.onnx").write_bytes(content)
        file = StoredFile(name="model.onnx", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        received = Received(directory, {UploadKind.MODEL: [file]})
        return services.uploads.store("default", received, UploadKind.MODEL)[0].id


def all_at_once(count: int, call: Callable[[int], object]) -> list[str]:
    """Call from that many threads at the same time; what each came to: "ok" or an error's code."""
    together = threading.Barrier(count)
    outcomes: list[str] = []

    def run(number: int) -> None:
        together.wait()
        try:
            call(number)
        except ServiceError as error:
            outcomes.append(error.cause.code)
        else:
            outcomes.append("ok")

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(outcomes)


def test_jobs_submitted_at_the_same_time_do_not_exceed_the_quota_together(services: Services) -> None:
    services.tenants.set_quotas("default", {"max_queued_jobs": 5})
    models = [store(services, str(number).encode()) for number in range(12)]
    jobs: JobService = services.jobs
    outcomes = all_at_once(
        12, lambda number: jobs.submit("default", PrepareRequest(kind="prepare", model=models[number]))
    )
    assert outcomes == ["job_quota_exceeded"] * 7 + ["ok"] * 5
    assert services.tenants.status("default", None).unfinished_jobs.used == 5


def test_uploads_at_the_same_time_do_not_exceed_the_quota_together(services: Services) -> None:
    services.tenants.set_quotas("default", {"max_bytes": 50})
    outcomes = all_at_once(12, lambda number: store(services, bytes([number]) * 10))
    assert outcomes == ["ok"] * 5 + ["storage_quota_exceeded"] * 7
    assert services.tenants.status("default", None).stored_bytes.used == 50


def test_the_same_request_at_the_same_time_meets_no_quota(services: Services) -> None:
    """One of them is the job, and the others are answered with it."""
    services.tenants.set_quotas("default", {"max_queued_jobs": 1})
    request = PrepareRequest(kind="prepare", model=store(services, b"m"))
    assert all_at_once(8, lambda number: services.jobs.submit("default", request)) == ["ok"] * 8


def test_content_that_two_tenants_have_counts_for_both(client: TestClient) -> None:
    services: Services = client.app.state.services
    services.tenants.create("other", "", Quotas())
    for tenant in ("default", "other"):
        with services.data.staged() as directory:
            (directory / "models").mkdir()
            (directory / "models/model.onnx").write_bytes(b"x" * 10)
            file = StoredFile(name="model.onnx", bytes=10, sha256=hashlib.sha256(b"x" * 10).hexdigest())
            received = Received(directory, {UploadKind.MODEL: [file]})
            services.uploads.store(tenant, received, UploadKind.MODEL)
        assert services.tenants.status(tenant, None).stored_bytes.used == 10


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_results_from_before_quotas_count(kind: str, tmp_path: Path) -> None:
    if kind == "sqlite":
        check_migration(f"sqlite:///{tmp_path / 'test.db'}")
    else:
        with postgresql_database() as url:
            check_migration(url)


def check_migration(url: str) -> None:
    """Give a database without the column two jobs, then bring it up to date."""
    database = Database(url)
    insert = text(
        "INSERT INTO jobs (id, tenant, kind, request, request_digest, state, revision, fraction, files,"
        " bundle, attempt, losses, heartbeat, created_at) VALUES (:id, 'default', 'prepare', '{}', :id,"
        " :state, 0, 1.0, :files, :bundle, 1, 0, 0, '2026-01-01 00:00:00')"
    )
    files = json.dumps([{"name": "a", "bytes": 5, "sha256": ""}, {"name": "b", "bytes": 7, "sha256": ""}])
    bundle = json.dumps({"name": "bundle.zip", "bytes": 30, "sha256": ""})
    with database.writing() as session:
        migrations.upgrade(session.connection(), v0006_result_bytes.down_revision)
        session.execute(insert, {"id": "1", "state": "succeeded", "files": files, "bundle": bundle})
        session.execute(insert, {"id": "2", "state": "succeeded", "files": files, "bundle": None})
        session.execute(insert, {"id": "3", "state": "failed", "files": "[]", "bundle": None})
    database.migrate()
    with database.reading() as session:
        sizes = session.execute(text("SELECT result_bytes FROM jobs ORDER BY id")).scalars().all()
    database.close()
    assert sizes == [42, 12, 0]
