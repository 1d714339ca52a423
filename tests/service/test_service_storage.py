"""Files: whole or not there, stored once, the same from a local directory as from an S3 server."""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from servers import (
    S3_CREDENTIALS,
    postgresql_database,
    s3_bucket,
    s3_client,
    wait_until_one_waits_for_a_lock,
)
from service_helpers import assert_problem, submit, wait_for
from sqlalchemy import Engine, event, text

from service.services import Services
from service.settings import Settings
from service.storage.directory import DataDirectory
from service.storage.local import LocalStore
from service.storage.store import Store, StoreUnavailableError, blob_key, open_store
from service.tenants.models import TenantRow
from service.uploads.kinds import UploadKind
from service.uploads.models import UploadBlobRow, UploadRow
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile

CONTENT = bytes(range(256)) * 300


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3_bucket() as settings:
        yield settings


@pytest.fixture(params=["local", "s3"])
def store_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings that choose the store."""
    if request.param == "local":
        return {}
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    settings: dict[str, str] = request.getfixturevalue("bucket")
    return {**settings, "store_url": f"{settings['store_url']}/{request.node.name}"}


@pytest.fixture
def store(store_settings: dict[str, Any], tmp_path: Path) -> Store:
    data = DataDirectory(tmp_path / "data")
    data.create()
    return open_store(Settings(data_dir=data.root, **store_settings), data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_a_file_is_kept_under_its_key_and_comes_back(store: Store, file: Path, tmp_path: Path) -> None:
    assert not store.exists("results/j/1/files/a")
    store.put("results/j/1/files/a", file)
    assert store.exists("results/j/1/files/a")
    store.fetch("results/j/1/files/a", tmp_path / "back", sha256(CONTENT))
    assert (tmp_path / "back").read_bytes() == CONTENT
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o444
    store.check()


@pytest.mark.parametrize("made", ["results/j", "results/j/2"])
def test_a_file_is_kept_while_another_attempt_is_removed(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """The directory of a job goes with its last attempt: perhaps when another one is about to begin."""
    data = DataDirectory(tmp_path / "data")
    data.create()
    store = LocalStore(data.root)
    store.put("results/j/1/files/a", file)
    mkdir = Path.mkdir
    removed: list[str] = []

    def remove_before(path: Path, *args: Any, **kwargs: Any) -> None:
        if path == data.root / made and not removed:
            removed.append(made)
            store.delete_all("results/j/1/")
            store.delete_all("results/j/")
        mkdir(path, *args, **kwargs)

    if made == "results/j":
        store.delete_all("results/j/1/")
    monkeypatch.setattr(Path, "mkdir", remove_before)
    store.put("results/j/2/files/a", file)
    assert removed == [made]
    assert b"".join(store.read("results/j/2/files/a", 0, len(CONTENT))) == CONTENT
    assert (data.root / "results").is_dir()


@pytest.mark.parametrize(
    ("start", "end"), [(0, len(CONTENT)), (3, 9), (len(CONTENT) - 1, len(CONTENT)), (5, 5)]
)
def test_a_range_is_read(store: Store, file: Path, start: int, end: int) -> None:
    store.put("blobs/a", file)
    assert b"".join(store.read("blobs/a", start, end)) == CONTENT[start:end]


def test_what_is_not_there_is_said_to_be_so_at_once(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("blobs/missing", 0, 1)
    with pytest.raises(FileNotFoundError):
        store.fetch("blobs/missing", tmp_path / "back", sha256(CONTENT))
    store.delete("blobs/missing")
    store.delete_all("results/missing/1/")


def test_a_file_is_never_changed(store: Store, file: Path, tmp_path: Path) -> None:
    store.put("blobs/a", file)
    store.put("blobs/a", file)
    store.fetch("blobs/a", tmp_path / "back", sha256(CONTENT))
    assert (tmp_path / "back").read_bytes() == CONTENT


def test_deleting_takes_what_it_is_told_and_nothing_else(store: Store, file: Path) -> None:
    keys = ["results/j/1/files/a", "results/j/1/bundle.zip", "results/j/10/files/a", "blobs/a"]
    for key in keys:
        store.put(key, file)
    store.delete_all("results/j/1/")
    assert [store.exists(key) for key in keys] == [False, False, True, True]
    store.delete("blobs/a")
    assert [store.exists(key) for key in keys] == [False, False, True, False]


def test_a_file_larger_than_a_part_is_kept_whole(store: Store, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 40
    (tmp_path / "large").write_bytes(content)
    store.put("blobs/large", tmp_path / "large")
    store.fetch("blobs/large", tmp_path / "back", sha256(content))
    assert sha256((tmp_path / "back").read_bytes()) == sha256(content)


def test_locally_no_bytes_are_copied(tmp_path: Path, file: Path) -> None:
    store = LocalStore(tmp_path / "store")
    number = file.stat().st_ino
    store.put("blobs/a", file)
    store.fetch("blobs/a", tmp_path / "back", sha256(CONTENT))
    assert (tmp_path / "back").stat().st_ino == number


def test_where_there_are_no_hard_links_files_are_copied(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path / "store")
    store.put("blobs/a", file)
    store.fetch("blobs/a", tmp_path / "back", sha256(CONTENT))
    assert (tmp_path / "back").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "store/blobs").iterdir()] == ["a"]


def test_content_that_changed_in_the_bucket_is_not_used(
    bucket: dict[str, str], tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store = open_store(Settings(data_dir=tmp_path, **bucket), DataDirectory(tmp_path))
    store.put("blobs/a", file)
    s3_client(bucket["store_endpoint"]).put_object(
        Bucket="onnx-qat", Key="some/prefix/blobs/a", Body=CONTENT[:-1]
    )
    with pytest.raises(OSError, match="something else than was stored"):
        store.fetch("blobs/a", tmp_path / "back", sha256(CONTENT))
    assert not (tmp_path / "back").exists()


# The service on either store.


@pytest.fixture
def client(start_client, store_settings: dict[str, Any]) -> TestClient:
    return start_client(**store_settings)


def test_a_job_runs_and_its_files_can_be_downloaded(client: TestClient) -> None:
    script = b'{"files": {"a": "0123456789"}}'
    files = [("model", script), ("external_data", ("w.bin", b"weights")), ("calibration", b"samples")]
    job = wait_for(client, client.post("/v1/prepare", files=files).json()["id"])
    assert job["state"] == "succeeded"
    seen = client.get(f"/v1/jobs/{job['id']}/files/seen.json").json()
    assert (seen["calibration"], seen["beside_model"]) == ("samples", ["model.onnx", "w.bin"])
    url = f"/v1/jobs/{job['id']}/files/a"
    assert client.get(url).content == b"0123456789"
    part = client.get(url, headers={"range": "bytes=-3"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"789", "bytes 7-9/10")
    several = client.get(url, headers={"range": "bytes=0-1,4-5"})
    assert (several.status_code, several.content) == (200, b"0123456789")
    bundle = client.get(f"/v1/jobs/{job['id']}/bundle")
    assert sha256(bundle.content) == job["bundle"]["sha256"]

    request = {"kind": "finalize", "prepare_job": job["id"]}
    done = wait_for(client, client.post("/v1/jobs", json=request).json()["id"])
    result = client.get(f"/v1/jobs/{done['id']}/files/model.int8.onnx").json()
    assert result == [["a", "seen.json"], None, None]


def test_a_client_may_be_sent_to_the_bucket(start_client, bucket, monkeypatch) -> None:
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    client = start_client(**bucket, presigned_downloads=True)
    job = submit(client, {"files": {"a": "0123456789"}})
    wait_for(client, job)
    answer = client.get(f"/v1/jobs/{job}/files/a", follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["cache-control"] == "private, no-store"
    location = answer.headers["location"]
    assert location.startswith(bucket["store_endpoint"])
    assert httpx.get(location, headers={"range": "bytes=2-4"}).content == b"234"
    tag = {"if-none-match": f'"{sha256(b"0123456789")}"'}
    assert client.get(f"/v1/jobs/{job}/files/a", headers=tag, follow_redirects=False).status_code == 304
    for path, start in (("files/a", b"0123456789"), ("bundle", b"PK")):
        here = client.get(f"/v1/jobs/{job}/{path}?redirect=false", follow_redirects=False)
        assert (here.status_code, here.content[: len(start)]) == (200, start)


def test_a_client_is_sent_to_the_address_that_it_can_reach(start_client, bucket, monkeypatch) -> None:
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    public = "https://files.example.com"
    client = start_client(**bucket, presigned_downloads=True, store_public_endpoint=public)
    job = submit(client, {"files": {"a": "0123456789"}})
    wait_for(client, job)
    location = client.get(f"/v1/jobs/{job}/files/a", follow_redirects=False).headers["location"]
    assert location.startswith(f"{public}/onnx-qat/some/prefix/")
    assert "X-Amz-SignedHeaders=host" in location


@pytest.mark.parametrize(
    ("url", "settings", "region", "start"),
    [
        ("s3://models/a/b", {}, None, "https://models.s3.us-east-1.amazonaws.com/a/b/blobs/x?"),
        ("s3://models", {}, "eu-central-1", "https://models.s3.eu-central-1.amazonaws.com/blobs/x?"),
        (
            "s3://models",
            {"store_region": "eu-west-3"},
            "eu-central-1",
            "https://models.s3.eu-west-3.amazonaws.com/blobs/x?",
        ),
        ("s3://models", {}, "", "https://models.s3.us-east-1.amazonaws.com/blobs/x?"),
        (
            "s3://models.example.com",
            {},
            None,
            "https://s3.us-east-1.amazonaws.com/models.example.com/blobs/x?",
        ),
        (
            "s3://models",
            {"store_public_endpoint": "https://files.example.com"},
            None,
            "https://files.example.com/models/blobs/x?",
        ),
    ],
)
def test_without_an_endpoint_the_bucket_is_amazons(
    url: str,
    settings: dict[str, Any],
    region: str | None,
    start: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    if region is not None:
        monkeypatch.setenv("AWS_REGION", region)
    chosen = Settings(data_dir=tmp_path, store_url=url, presigned_downloads=True, **settings)
    link = open_store(chosen, DataDirectory(tmp_path)).link("blobs/x")
    assert link is not None
    assert link.startswith(start)
    assert f"%2F{settings.get('store_region') or region or 'us-east-1'}%2Fs3%2F" in link


def test_an_endpoint_may_be_where_amazons_own_tools_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**S3_CREDENTIALS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    chosen = Settings(data_dir=tmp_path, store_url="s3://models", presigned_downloads=True)
    link = open_store(chosen, DataDirectory(tmp_path)).link("blobs/x")
    assert link is not None
    assert link.startswith("http://127.0.0.1:9/models/blobs/x?")


def test_a_store_that_does_not_answer_is_said_to_be_so(start_client, monkeypatch) -> None:
    monkeypatch.setattr("service.storage.s3._RETRY", {"max_retries": 0})
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    client = start_client(store_url="s3://onnx-qat", store_endpoint="http://127.0.0.1:9")
    answer = client.post("/v1/models", content=b"model")
    assert_problem(answer, 503, "store_unavailable")
    assert answer.headers["retry-after"]
    assert_problem(client.get("/health/ready"), 503, "not_ready")


def test_a_bucket_that_is_not_there_is_said_to_be_missing(
    start_client, bucket: dict[str, str], tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    settings = {**bucket, "store_url": "s3://nosuch/prefix"}
    client = start_client(**settings)
    answer = client.post("/v1/models", content=b"model")
    assert_problem(answer, 503, "store_unavailable")
    detail = assert_problem(client.get("/health/ready"), 503, "not_ready")["detail"]
    assert detail == "The store of files does not answer."
    store = open_store(Settings(data_dir=tmp_path, **settings), DataDirectory(tmp_path))
    for call in (
        store.check,
        lambda: store.put("blobs/a", file),
        lambda: store.read("blobs/a", 0, 1),
        lambda: store.fetch("blobs/a", tmp_path / "back", sha256(CONTENT)),
        lambda: store.delete_all("results/j/"),
    ):
        with pytest.raises(StoreUnavailableError, match=r"no such bucket.*ONNX_QAT_STORE_URL"):
            call()


# Content that belongs to nobody.


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


def store_model(services: Services, tenant: str, content: bytes) -> str:
    with services.data.staged() as directory:
        (directory / "models").mkdir()
        (directory / "models/model.onnx").write_bytes(content)
        file = StoredFile(name="model.onnx", bytes=len(content), sha256=sha256(content))
        received = Received(directory, {UploadKind.MODEL: [file]})
        return services.uploads.store(tenant, received, UploadKind.MODEL)[0].id


def remove_upload(services: Services, tenant: str, identifier: str) -> None:
    with services.database.writing() as session:
        session.delete(session.get_one(UploadRow, (tenant, "models", identifier)))


NOW = datetime.timedelta(seconds=-1)


def test_content_goes_with_its_last_upload(services: Services) -> None:
    for tenant in ("default", "other"):
        identifier = store_model(services, tenant, b"shared")
    kept = store_model(services, "default", b"kept")
    remove_upload(services, "default", identifier)
    assert services.uploads.remove_unreferenced(NOW) == 0
    remove_upload(services, "other", identifier)
    assert services.uploads.remove_unreferenced(datetime.timedelta(hours=1)) == 0
    assert services.uploads.remove_unreferenced(NOW) == len(b"shared")
    assert not services.store.exists(blob_key(identifier))
    assert services.store.exists(blob_key(kept))
    with services.database.reading() as session:
        assert [row.sha256 for row in session.query(UploadBlobRow)] == [kept]
    assert store_model(services, "other", b"shared") == identifier
    assert services.store.exists(blob_key(identifier))


def test_content_that_is_uploaded_while_it_is_removed_is_there_afterwards(services: Services) -> None:
    """Removal runs after the upload has found the content in the store, and before its row is written."""
    identifier = store_model(services, "default", b"contested")
    remove_upload(services, "default", identifier)
    exists = services.store.exists
    removed = []

    def exists_and_then_not(key: str) -> bool:
        found = exists(key)
        if not removed:
            removed.append(services.uploads.remove_unreferenced(NOW))
        return found

    services.store.exists = exists_and_then_not  # type: ignore[method-assign]
    assert store_model(services, "other", b"contested") == identifier
    assert removed == [len(b"contested")]
    assert exists(blob_key(identifier))


def test_uploads_and_removals_of_the_same_content_leave_every_upload_whole(services: Services) -> None:
    stop = threading.Event()
    failures: list[str] = []

    def remove() -> None:
        while not stop.is_set():
            services.uploads.remove_unreferenced(NOW)

    def upload(tenant: str) -> None:
        for _ in range(15):
            identifier = store_model(services, tenant, b"contested")
            if not services.store.exists(blob_key(identifier)):
                failures.append(tenant)
            remove_upload(services, tenant, identifier)

    remover = threading.Thread(target=remove)
    uploaders = [threading.Thread(target=upload, args=[tenant]) for tenant in ("default", "other")]
    for thread in (remover, *uploaders):
        thread.start()
    for thread in uploaders:
        thread.join()
    stop.set()
    remover.join()
    assert failures == []


@pytest.mark.parametrize("services", ["postgresql"], indirect=True)
def test_content_that_is_uploaded_while_it_is_searched_for_stays(services: Services) -> None:
    """The search has begun, and so sees no upload of it; the upload is committed before the row is locked."""
    identifier = store_model(services, "default", b"contested")
    remove_upload(services, "default", identifier)

    def hold(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        if "FROM blobs" in statement and "SKIP LOCKED" in statement:
            assert "ORDER BY" in statement
            statement = statement.replace("ORDER BY", "AND pg_advisory_xact_lock(1)::text = '' ORDER BY")
        return statement, parameters

    assert services.settings.database_url is not None
    event.listen(Engine, "before_cursor_execute", hold, retval=True)
    try:
        with ThreadPoolExecutor() as pool, services.database.reading() as session:
            session.execute(text("SELECT pg_advisory_xact_lock(1)"))
            removal = pool.submit(services.uploads.remove_unreferenced, NOW)
            wait_until_one_waits_for_a_lock(services.settings.database_url)
            assert store_model(services, "other", b"contested") == identifier
            session.rollback()
            assert removal.result(60) == 0
    finally:
        event.remove(Engine, "before_cursor_execute", hold)
    assert services.store.exists(blob_key(identifier))
    assert services.uploads.get("other", UploadKind.MODEL, identifier).bytes == len(b"contested")


# The data directory.


def test_what_another_living_process_works_on_is_left_alone(tmp_path: Path) -> None:
    """Several processes share a data directory; what a dead one left is removed at the next start."""
    program = (
        "import sys, time; from pathlib import Path; from service.storage.directory import DataDirectory\n"
        "data = DataDirectory(Path(sys.argv[1])); data.create()\n"
        "with data.staged() as staged, data.workplace('job') as (inputs, scratch):\n"
        "    (scratch / 'file').write_text('x')\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    data = DataDirectory(tmp_path / "data")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        data.create()
        assert [len(list(folder.iterdir())) for folder in (data.staging, data.inputs, data.scratch)] == [
            1,
            1,
            1,
        ]
    finally:
        process.kill()
        process.wait()
    data.create()
    assert [len(list(folder.iterdir())) for folder in (data.staging, data.inputs, data.scratch)] == [0, 0, 0]


def test_files_of_version_0_1_0_are_taken_over(tmp_path: Path) -> None:
    model = tmp_path / "uploads/models" / sha256(b"model") / "model.onnx"
    result = tmp_path / "results/j/files/manifest.json"
    for path, content in ((model, b"model"), (result, b"{}"), (tmp_path / "results/j/bundle.zip", b"zip")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    store = LocalStore(tmp_path)
    for _ in range(2):
        store.adopt_version_0_1_0()
        assert b"".join(store.read(blob_key(sha256(b"model")), 0, 5)) == b"model"
        assert b"".join(store.read("results/j/1/files/manifest.json", 0, 2)) == b"{}"
        assert b"".join(store.read("results/j/1/bundle.zip", 0, 3)) == b"zip"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "results"]
