"""The schema on both databases: made in steps, by several processes at once, from any earlier version."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from servers import POSTGRESQL, postgresql_database
from service_helpers import assert_problem, wait_for
from sqlalchemy import Engine, create_engine, event, inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from typer.testing import CliRunner

import service.webhooks.models
from rewriter import Recipe
from service import migrations
from service.cli import app as command_line
from service.database import Base, Database
from service.errors import ServiceError
from service.jobs.models import JobRow
from service.jobs.schemas import FinalizeRequest, PrepareRequest
from service.migrations.versions import v0011_inputs
from service.services import Services
from service.settings import Settings
from service.tenants.models import DEFAULT_TENANT, TenantRow
from service.uploads.kinds import UploadKind
from service.uploads.models import UploadRow
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
    else:
        with postgresql_database() as url:
            yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


def test_the_migrations_make_what_the_mapped_classes_say(database: Database) -> None:
    with database.reading() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, Base.metadata) == []


def test_one_job_for_each_request_holds_for_unfinished_and_succeeded_jobs_only(database: Database) -> None:
    """Comparing schemas does not compare the condition of an index."""
    with database.reading() as session:
        (index,) = (
            index
            for index in inspect(session.connection()).get_indexes("jobs")
            if index["name"] == "one_job_for_each_request"
        )
    assert index["unique"]
    assert index["column_names"] == ["tenant", "request_digest"]
    (condition,) = (str(value) for key, value in index["dialect_options"].items() if key.endswith("_where"))
    assert [state for state in ("queued", "running", "succeeded") if state in condition] == [
        "queued",
        "running",
        "succeeded",
    ]
    assert "failed" not in condition
    assert "cancelled" not in condition


def test_migrating_again_changes_nothing(database: Database) -> None:
    database.migrate()
    with database.reading() as session:
        assert session.get_one(TenantRow, DEFAULT_TENANT).name == "default"


def test_several_replicas_may_migrate_at_the_same_time() -> None:
    with postgresql_database() as url:
        errors: list[Exception] = []

        def start() -> None:
            replica = Database(url)
            try:
                replica.migrate()
            except Exception as error:
                errors.append(error)
            finally:
                replica.close()

        replicas = [threading.Thread(target=start) for _ in range(4)]
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.join()
        assert errors == []


def test_a_row_of_an_unknown_tenant_is_refused(database: Database) -> None:
    with pytest.raises(IntegrityError), database.writing() as session:
        session.add(
            service.webhooks.models.WebhookDeliveryRow(
                id="1", tenant="nobody", subscription="1", job="1", event="e", url="u", body="{}"
            )
        )


# What version 0.1.0 made: its own statements, as `sqlite3 onnx-qat.db .schema` shows them.
VERSION_0_1_0 = """
CREATE TABLE uploads (
    kind VARCHAR(16) NOT NULL, id VARCHAR(64) NOT NULL, bytes BIGINT NOT NULL, files JSON NOT NULL,
    created_at DATETIME NOT NULL, PRIMARY KEY (kind, id)
);
CREATE TABLE jobs (
    number INTEGER NOT NULL, id VARCHAR(32) NOT NULL, kind VARCHAR(16) NOT NULL, request JSON NOT NULL,
    request_digest VARCHAR(64) NOT NULL, state VARCHAR(16) NOT NULL, revision INTEGER NOT NULL,
    stage VARCHAR(100), fraction DOUBLE NOT NULL, failure JSON, files JSON NOT NULL, bundle JSON,
    created_at DATETIME NOT NULL, started_at DATETIME, finished_at DATETIME,
    PRIMARY KEY (number), UNIQUE (id)
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE UNIQUE INDEX one_job_for_each_request ON jobs (request_digest)
    WHERE state IN ('queued', 'running', 'succeeded');
CREATE TABLE idempotency_keys (
    "key" VARCHAR(255) NOT NULL, request_digest VARCHAR(64) NOT NULL, job_number INTEGER NOT NULL,
    created_at DATETIME NOT NULL, PRIMARY KEY ("key"), FOREIGN KEY(job_number) REFERENCES jobs (number)
);
"""
UPLOAD = "a" * 64
JOB = "b" * 32


def fill_version_0_1_0(file: Path) -> None:
    at = "2026-01-02 03:04:05.000000"
    model = [{"name": "model.onnx", "bytes": 2, "sha256": UPLOAD}]
    result = [{"name": "manifest.json", "bytes": 2, "sha256": "c" * 64}]
    request = {"kind": "prepare", "model": UPLOAD, "recipe": {}, "calibration": None}
    with sqlite3.connect(file) as old:
        old.executescript(VERSION_0_1_0)
        old.execute("INSERT INTO uploads VALUES ('models', ?, 2, ?, ?)", (UPLOAD, json.dumps(model), at))
        old.execute(
            "INSERT INTO jobs VALUES"
            " (7, ?, 'prepare', ?, 'd', 'succeeded', 3, 'write', 1.0, NULL, ?, NULL, ?, ?, ?)",
            (JOB, json.dumps(request), json.dumps(result), at, at, at),
        )
        old.execute("INSERT INTO idempotency_keys VALUES ('k', 'd', 7, ?)", (at,))
    old.close()


def test_a_database_of_version_0_1_0_is_brought_up_to_date_without_loss(tmp_path: Path) -> None:
    file = tmp_path / "data" / "onnx-qat.db"
    file.parent.mkdir()
    fill_version_0_1_0(file)
    services = Services.of(Settings(data_dir=tmp_path / "data"))
    with services.opened():
        upload = services.uploads.get(DEFAULT_TENANT, UploadKind.MODEL, UPLOAD)
        assert [file.name for file in upload.files] == ["model.onnx"]
        assert upload.created_at == datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
        job = services.jobs.get(DEFAULT_TENANT, JOB)
        assert (job.state, job.files[0].name, job.revision) == ("succeeded", "manifest.json", 3)
        with services.database.reading() as session:
            connection = session.connection()
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, Base.metadata) == []
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql(
                "SELECT tenant, key, job_number FROM idempotency_keys"
            ).all() == [("default", "k", 7)]
            assert connection.exec_driver_sql(
                "SELECT tenant, job_number, kind, upload FROM job_uploads"
            ).all() == [("default", 7, "models", UPLOAD)]


def test_inputs_are_taken_out_of_the_requests_that_are_there(database_url: str) -> None:
    requests = [
        {"kind": "prepare", "model": UPLOAD, "calibration": None, "recipe": {"scope": "a\0b"}},
        {"kind": "finalize", "prepare_job": JOB, "checkpoint": UPLOAD, "verify": None},
    ] * 60  # more than are read at a time
    database = Database(database_url)
    with database.writing() as session:
        migrations.upgrade(session.connection(), v0011_inputs.down_revision)
        for number, request in enumerate(requests):
            session.execute(
                text(
                    "INSERT INTO jobs (id, tenant, kind, request, request_digest, state, revision, fraction,"
                    " files, result_bytes, attempt, losses, heartbeat, created_at) VALUES (:id, 'default',"
                    " 'prepare', :request, :id, 'queued', 0, 0.0, '[]', 0, 0, 0, 0, '2026-01-01 00:00:00')"
                ),
                {"id": str(number), "request": json.dumps(request)},
            )
    database.migrate()
    with database.reading() as session:
        inputs = session.scalars(select(JobRow.inputs).order_by(JobRow.number)).all()
    database.close()
    assert inputs == [{"model": UPLOAD}, {"prepare_job": JOB, "checkpoint": UPLOAD}] * 60


def test_the_command_migrates(tmp_path: Path) -> None:
    result = CliRunner().invoke(command_line, ["migrate", "--data-dir", str(tmp_path / "data")])
    assert result.exit_code == 0, result.output
    engine = create_engine(f"sqlite:///{tmp_path / 'data/onnx-qat.db'}")
    assert "alembic_version" in inspect(engine).get_table_names()
    engine.dispose()


@pytest.fixture
def services(database_url: str, tmp_path: Path) -> Iterator[Services]:
    """The service's parts, and a second tenant."""
    shared = None if database_url.startswith("sqlite:") else database_url
    services = Services.of(Settings(data_dir=tmp_path / "data", database_url=shared))
    with services.opened():
        with services.database.writing() as session:
            session.add(TenantRow(id="other", name="other"))
        yield services


def store_model(services: Services, tenant: str, content: bytes = b"{}") -> str:
    with services.data.staged() as directory:
        (directory / "models").mkdir()
        (directory / "models/model.onnx").write_bytes(content)
        file = StoredFile(name="model.onnx", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        received = Received(directory, {UploadKind.MODEL: [file]})
        upload, is_new = services.uploads.store(tenant, received, UploadKind.MODEL)
    assert is_new
    return upload.id


def test_what_belongs_to_another_tenant_is_unknown(services: Services) -> None:
    model = store_model(services, "default")
    request = PrepareRequest(kind="prepare", model=model)
    job = services.jobs.submit("default", request, "key")
    for call, code in (
        (lambda: services.uploads.get("other", UploadKind.MODEL, model), "model_not_found"),
        (lambda: services.jobs.submit("other", request), "model_not_found"),
        (lambda: services.jobs.get("other", job.id), "job_not_found"),
        (lambda: services.jobs.cancel("other", job.id), "job_not_found"),
        (lambda: services.jobs.bundle("other", job.id), "job_not_found"),
        (lambda: services.jobs.result_file("other", job.id, "manifest.json"), "job_not_found"),
    ):
        with pytest.raises(ServiceError) as error:
            call()
        assert error.value.cause.code == code
    assert services.jobs.page("other", state=None, cursor=None, limit=10).items == []
    assert services.jobs.get("default", job.id).state == "queued"


def test_two_tenants_have_the_same_content_the_same_work_and_the_same_key(services: Services) -> None:
    jobs = []
    for tenant in ("default", "other"):
        model = store_model(services, tenant)
        jobs.append(services.jobs.submit(tenant, PrepareRequest(kind="prepare", model=model), "key"))
    assert jobs[0].request == jobs[1].request
    assert jobs[0].id != jobs[1].id


class LaterRequest(PrepareRequest):
    """As a later version may have it."""

    more: int = 1


def test_a_key_stands_for_the_same_request_in_every_version(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"kind": "prepare", "model": store_model(services, "default")}
    job = services.jobs.submit("default", PrepareRequest(**fields), "key")
    services.jobs.cancel("default", job.id)
    retried = services.jobs.retry("default", job.id, "key of the retry")
    assert retried.id != job.id
    monkeypatch.setattr("service.jobs.service._VERSION", "0.2.0")
    for request in (LaterRequest(**fields), PrepareRequest(**fields, recipe=Recipe(), calibration=None)):
        assert services.jobs.submit("default", request, "key").id == job.id
    assert services.jobs.retry("default", job.id, "key of the retry").id == retried.id
    with pytest.raises(ServiceError, match="used for another request"):
        services.jobs.submit("default", PrepareRequest(**fields, recipe=Recipe(weight_bits=4)), "key")


def test_the_same_request_at_the_same_time_is_one_job(services: Services) -> None:
    model = store_model(services, "default")
    request = PrepareRequest(kind="prepare", model=model)
    together = threading.Barrier(8)
    ids: list[str] = []

    def submit(number: int) -> None:
        together.wait()
        ids.append(services.jobs.submit("default", request, f"key {number % 2}").id)

    threads = [threading.Thread(target=submit, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_uploads_are_locked_before_jobs(services: Services) -> None:
    """In one order by every submission, so that no two of them wait for each other."""
    model, checkpoint, data = (store_model(services, "default", content) for content in (b"1", b"2", b"3"))
    with services.database.writing() as session:
        # The same content, as if it had been uploaded as these.
        for kind, identifier in ((UploadKind.CHECKPOINT, checkpoint), (UploadKind.DATASET, data)):
            row = session.get_one(UploadRow, ("default", UploadKind.MODEL.value, identifier))
            session.add(UploadRow(tenant="default", kind=kind.value, id=row.id, bytes=1, files=row.files))
    prepare = PrepareRequest(kind="prepare", model=model, calibration=data)
    job = services.jobs.submit("default", prepare)
    services.leases.succeed(services.leases.claim(), [], None)
    locked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "FOR NO KEY UPDATE" in statement or statement.startswith("UPDATE"):
            (table,) = re.findall(r"(?:FROM|UPDATE) (\w+)", statement)
            locked.append(table)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        finalize = FinalizeRequest(kind="finalize", prepare_job=job.id, checkpoint=checkpoint, verify=data)
        for request in (finalize, finalize, prepare):
            services.jobs.submit("default", request)
            assert locked == sorted(locked, key=["uploads", "jobs"].index)
            assert set(locked) == {"uploads", "jobs"}
            locked.clear()
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_of_two_changes_that_wait_for_each_other_one_is_made_again(database: Database) -> None:
    with database.writing() as session:
        session.add_all([TenantRow(id="a", name="0"), TenantRow(id="b", name="0 ")])
    both = threading.Barrier(2)
    calls: list[str] = []

    def change(first: str, second: str) -> None:
        def add_one(session: Session) -> None:
            calls.append(first)
            for number, tenant in enumerate((first, second)):
                row = session.get_one(TenantRow, tenant, with_for_update=True)
                row.name = f"{int(row.name) + 1}{' ' * (tenant == 'b')}"
                session.flush()
                if number == 0 and len(calls) <= 2:
                    both.wait(60)

        database.write(add_one)

    with ThreadPoolExecutor() as pool:
        for change_made in [pool.submit(change, "a", "b"), pool.submit(change, "b", "a")]:
            change_made.result(120)
    assert len(calls) == 3
    with database.reading() as session:
        assert [session.get_one(TenantRow, tenant).name for tenant in ("a", "b")] == ["2", "2 "]


def test_jobs_run_on_postgresql(start_client) -> None:
    with postgresql_database() as url:
        client: TestClient = start_client(database_url=url)
        answer = client.post("/v1/prepare", files={"model": b'{"files": {"a": "1"}}'})
        job = wait_for(client, answer.json()["id"])
        assert job["state"] == "succeeded"
        del job["request"]["recipe"]
        assert client.get("/v1/jobs").json()["items"] == [job]


def test_a_lost_database_is_said_to_be_so_until_it_is_back(start_client) -> None:
    with postgresql_database() as url:
        client: TestClient = start_client(database_url=url)
        with psycopg.connect(POSTGRESQL, autocommit=True) as server:
            name = url.rpartition("/")[2]
            server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            end_connections(server, name)
            answer = client.get("/v1/jobs")
            assert_problem(answer, 503, "database_unavailable")
            assert answer.headers["retry-after"] == "2"
            assert_problem(client.get("/health/ready"), 503, "not_ready")
            server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        assert client.get("/v1/jobs").json()["items"] == []


def end_connections(server: psycopg.Connection, database: str) -> None:
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])


def test_a_full_disk_of_the_database_is_said_to_be_so(start_client) -> None:
    client: TestClient = start_client(workers=0)
    with client.app.state.services.database.writing() as session:  # type: ignore[attr-defined]
        session.execute(text("PRAGMA max_page_count = 1"))  # of this connection, which is used again
    for number in range(256):
        answer = client.post("/v1/models", content=bytes([number]))
        if answer.status_code != 201:
            break
    assert_problem(answer, 507, "storage_full")
