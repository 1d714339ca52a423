"""What is no longer wanted goes, and nothing goes that somebody uses."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from servers import S3_CREDENTIALS, postgresql_database, s3_bucket
from service_helpers import Workers, assert_problem, queue, submit, wait_for, wait_until
from structlog.testing import CapturingLogger

from service.database import now
from service.errors import Cause, ServiceError, ServiceErrorCode
from service.jobs import repository as job_rows
from service.jobs.schemas import FinalizeRequest, Job, PrepareRequest
from service.retention import repository, service
from service.retention.maintenance import Maintenance
from service.services import Services
from service.settings import Settings
from service.storage.store import StoreUnavailableError, blob_key, result_key
from service.uploads import repository as upload_rows
from service.uploads import service as upload_service
from service.uploads.kinds import UploadKind
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile

DAY = datetime.timedelta(days=1)
FAILURE = Cause(code=ServiceErrorCode.WORKER_CRASHED, detail="It crashed.")
UNKNOWN_JOB = "0" * 32
UNKNOWN_UPLOAD = "0" * 64

Start = Callable[..., Services]
Jump = Callable[[datetime.timedelta], None]


# Over HTTP.


def test_a_finished_job_is_deleted_with_all_that_leads_to_it(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k"}
    job = submit(client, {}, headers=headers)
    wait_for(client, job)
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    for path in ("", "/bundle", "/files/seen.json", "/events", "/deliveries"):
        assert_problem(client.get(f"/v1/jobs/{job}{path}"), 404, "job_not_found")
    assert_problem(client.delete(f"/v1/jobs/{job}"), 404, "job_not_found")
    assert client.get("/v1/jobs").json()["items"] == []
    # The work and the key are free again: a new job runs.
    again = submit(client, {}, headers=headers)
    assert again != job
    assert wait_for(client, again)["state"] == "succeeded"


def test_a_job_that_has_not_ended_is_not_deleted(client: TestClient) -> None:
    running = submit(client, {"seconds": 600})
    wait_for(client, running, "running")
    queued = submit(client, {})
    for job in (running, queued):
        assert_problem(client.delete(f"/v1/jobs/{job}"), 409, "job_not_finished")
        client.post(f"/v1/jobs/{job}/cancel")
        assert client.delete(f"/v1/jobs/{job}").status_code == 204


def test_an_upload_is_deleted_unless_an_unfinished_job_reads_it(client: TestClient) -> None:
    blocking = submit(client, {"seconds": 600})
    job = submit(client, {})
    model = client.get(f"/v1/jobs/{job}").json()["request"]["model"]
    assert_problem(client.delete(f"/v1/models/{model}"), 409, "upload_in_use")
    client.post(f"/v1/jobs/{blocking}/cancel")
    assert wait_for(client, job)["state"] == "succeeded"
    assert client.delete(f"/v1/models/{model}").status_code == 204
    assert_problem(client.get(f"/v1/models/{model}"), 404, "model_not_found")
    assert_problem(client.delete(f"/v1/models/{model}"), 404, "model_not_found")
    # What was made of it stays.
    assert client.get(f"/v1/jobs/{job}/bundle").status_code == 200
    # And it can come again.
    assert client.post("/v1/models", content=b"{}").status_code == 201


def test_unknown_uploads_are_not_found(client: TestClient) -> None:
    for collection, code in (
        ("models", "model_not_found"),
        ("datasets", "data_not_found"),
        ("checkpoints", "checkpoint_not_found"),
    ):
        assert_problem(client.delete(f"/v1/{collection}/{UNKNOWN_UPLOAD}"), 404, code)
        assert_problem(client.delete(f"/v1/{collection}/x"), 422, "request_invalid")
    assert_problem(client.delete(f"/v1/jobs/{UNKNOWN_JOB}"), 404, "job_not_found")


def test_expiry_is_seen_in_the_job_and_after_it_the_work_is_done_again(start_client) -> None:
    client: TestClient = start_client(retention_days=1e-9)
    job = submit(client, {})
    wait_for(client, job, "succeeded")
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    services.maintenance.run_once()
    assert_problem(client.get(f"/v1/jobs/{job}"), 404, "job_not_found")
    again = submit(client, {})
    assert again != job
    assert wait_for(client, again, "succeeded")["expires_at"] is not None


# The parts without running workers, on both databases and both stores.


@pytest.fixture(params=["sqlite", "postgresql and s3"])
def start(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    def start(**settings: Any) -> Services:
        return Services.of(Settings(data_dir=tmp_path, **common, **settings))

    common: dict[str, Any] = {}
    if request.param == "sqlite":
        yield start
        return
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with postgresql_database() as url, s3_bucket() as bucket:
        common = {"database_url": url, **bucket}
        yield start


@contextlib.contextmanager
def serving(services: Services) -> Iterator[None]:
    """Open the parts as `onnx-qat serve` does; others only open them."""
    with services.opened():
        services.removal.adopt_policy()
        yield


@pytest.fixture
def services(start: Start) -> Iterator[Services]:
    services = start(retention_days=30)
    with serving(services):
        yield services


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Sets the clock of what removes things, and of the use of uploads, forward from now."""

    def jump(by: datetime.timedelta) -> None:
        for module in (service, upload_service, upload_rows):
            monkeypatch.setattr(module, "now", lambda: now() + by)

    return jump


def store(services: Services, kind: UploadKind, name: str, content: bytes) -> str:
    with services.data.staged() as directory:
        (directory / kind.value).mkdir()
        (directory / kind.value / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        received = Received(directory, {kind: [StoredFile(name=name, bytes=len(content), sha256=digest)]})
        return services.uploads.store("default", received, kind)[0].id


def finish(services: Services, tmp_path: Path) -> None:
    """Let the oldest queued job succeed with a file."""
    claim = services.leases.claim()
    assert claim is not None
    content = b"result"
    file = tmp_path / "result"
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    services.store.put(result_key(claim.job.id, claim.job.attempt, "files/a"), file)
    assert services.leases.succeed(claim, [StoredFile(name="a", bytes=6, sha256=digest)], None)
    file.unlink()


def finished(services: Services, tmp_path: Path, number: int = 0) -> Job:
    job = queue(services, number)
    finish(services, tmp_path)
    return services.jobs.get("default", job.id)


def has_files(services: Services, job: Job) -> bool:
    return services.store.exists(result_key(job.id, 1, "files/a"))


def has_upload(services: Services, kind: UploadKind, identifier: str) -> bool:
    try:
        services.uploads.get("default", kind, identifier)
    except ServiceError:
        return False
    return True


def has_job(services: Services, job: Job) -> bool:
    try:
        services.jobs.get("default", job.id)
    except ServiceError:
        return False
    return True


def test_jobs_uploads_and_files_go_when_their_time_is_over(
    services: Services, tmp_path: Path, jump: Jump
) -> None:
    job = finished(services, tmp_path)
    assert job.expires_at is not None
    assert job.finished_at is not None
    assert job.expires_at - job.finished_at == pytest.approx(30 * DAY, abs=DAY / 24)
    assert isinstance(job.request, PrepareRequest)
    model = job.request.model

    jump(29 * DAY)
    services.maintenance.run_once()
    assert has_job(services, job)
    assert has_files(services, job)
    assert has_upload(services, UploadKind.MODEL, model)

    jump(31 * DAY)
    services.maintenance.run_once()
    assert not has_job(services, job)
    assert not has_upload(services, UploadKind.MODEL, model)
    # The files wait for those who have just found the job.
    assert has_files(services, job)
    jump(31 * DAY + datetime.timedelta(minutes=2))
    services.maintenance.run_once()
    assert not has_files(services, job)
    assert not services.store.exists(blob_key(model))


def test_what_unfinished_jobs_need_is_kept(services: Services, tmp_path: Path, jump: Jump) -> None:
    prepared = finished(services, tmp_path)
    checkpoint = store(services, UploadKind.CHECKPOINT, "checkpoint", b"trained")
    finalize = services.jobs.submit(
        "default", FinalizeRequest(kind="finalize", prepare_job=prepared.id, checkpoint=checkpoint)
    )
    with pytest.raises(ServiceError) as error:
        services.removal.delete_job("default", prepared.id)
    assert error.value.cause.code == "job_in_use"

    jump(365 * DAY)
    services.maintenance.run_once()
    assert has_files(services, prepared)
    assert has_upload(services, UploadKind.CHECKPOINT, checkpoint)
    finish(services, tmp_path)
    services.maintenance.run_once()
    assert not has_job(services, prepared)
    assert not has_job(services, finalize)
    services.maintenance.run_once()
    assert not has_upload(services, UploadKind.CHECKPOINT, checkpoint)


def test_uploads_of_kept_jobs_are_kept(start: Start, tmp_path: Path, jump: Jump) -> None:
    """A job that was asked for again lives longer, and so do its inputs."""
    services = start(retention_days=30)
    with serving(services):
        job = finished(services, tmp_path)
        assert isinstance(job.request, PrepareRequest)
        with services.database.writing() as session:
            row = upload_rows.find(session, "default", UploadKind.MODEL, job.request.model)
            assert row is not None
            row.used_at = now() - 40 * DAY
        services.maintenance.run_once()
        assert has_upload(services, UploadKind.MODEL, job.request.model)


def test_an_upload_that_comes_again_lives_longer(services: Services, jump: Jump) -> None:
    first = store(services, UploadKind.DATASET, "data.npz", b"first")
    second = store(services, UploadKind.DATASET, "data.npz", b"second")
    jump(20 * DAY)
    assert store(services, UploadKind.DATASET, "data.npz", b"second") == second
    jump(31 * DAY)
    services.maintenance.run_once()
    assert not has_upload(services, UploadKind.DATASET, first)
    assert has_upload(services, UploadKind.DATASET, second)


def test_a_job_that_is_asked_for_again_lives_longer(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finished(services, tmp_path)
    monkeypatch.setattr("service.retention.policy.now", lambda: now() + 20 * DAY)
    again = services.jobs.submit("default", job.request)
    assert again.id == job.id
    assert again.expires_at is not None
    assert job.expires_at is not None
    assert again.expires_at - job.expires_at == pytest.approx(20 * DAY, abs=DAY / 24)


def test_without_the_setting_everything_is_kept(start: Start, tmp_path: Path, jump: Jump) -> None:
    services = start()
    with serving(services):
        job = finished(services, tmp_path)
        dataset = store(services, UploadKind.DATASET, "data.npz", b"x")
        assert job.expires_at is None
        jump(10_000 * DAY)
        services.maintenance.run_once()
        assert has_files(services, job)
        assert has_upload(services, UploadKind.DATASET, dataset)


def test_a_setting_that_changes_holds_for_what_is_there(start: Start, tmp_path: Path) -> None:
    first = start()
    with serving(first):
        job = finished(first, tmp_path)
        first.maintenance.run_once()
    for days, expected in ((30, 30), (7, 7), (90, 7), (None, None)):
        services = start(retention_days=days)
        with serving(services):
            services.maintenance.run_once()
            expires_at = services.jobs.get("default", job.id).expires_at
            if expected is None:
                assert expires_at is None
            else:
                assert expires_at is not None
                assert expires_at - now() == pytest.approx(expected * DAY, abs=DAY / 24)


def test_processes_without_the_setting_go_by_what_the_api_has_set(tmp_path: Path) -> None:
    """A worker, and an API that knows nothing of it, neither lack the policy nor undo it."""
    with postgresql_database() as url, contextlib.ExitStack() as stack:

        def process(**settings: Any) -> Services:
            services = Services.of(Settings(data_dir=tmp_path / "data", database_url=url, **settings))
            stack.enter_context(services.opened())
            return services

        api = process(retention_days=30)
        api.removal.adopt_policy()
        worker, other_api = process(), process()
        other_api.removal.adopt_policy()
        prepared = finished(worker, tmp_path)
        assert prepared.expires_at is not None
        for services in (worker, other_api, api, worker):
            services.maintenance.run_once()
            assert services.jobs.get("default", prepared.id).expires_at == prepared.expires_at

        # What a worker's environment says of it counts for nothing.
        process(retention_days=1).maintenance.run_once()
        assert api.jobs.get("default", prepared.id).expires_at == prepared.expires_at

        # A longer time holds for what ends from then on, at workers that have run for long too.
        process(retention_days=90).removal.adopt_policy()
        worker.worker_maintenance.run_once()
        later = finished(worker, tmp_path, 2)
        assert later.expires_at is not None
        assert later.expires_at - prepared.expires_at > 59 * DAY

        # An API that is told so ends it, for all.
        process(retention_days=None).removal.adopt_policy()
        for services in (worker, api):
            services.maintenance.run_once()
            assert services.jobs.get("default", prepared.id).expires_at is None
        assert finished(worker, tmp_path, 1).expires_at is None


@pytest.mark.parametrize("days", [4e6, 1e300, float("inf"), -1e300])
def test_a_policy_from_before_settings_had_bounds_keeps_no_job_from_its_end(
    start: Start, days: float
) -> None:
    services = start()
    with services.opened():
        with services.database.writing() as session:
            repository.set_policy(session, days)
        services.removal.read_policy()
        job = queue(services)
        services.jobs.cancel("default", job.id)
        services.removal.expire_uploads()
        services.removal.expire_jobs()


def test_a_worker_that_knows_nothing_of_links_to_the_store_leaves_their_files(tmp_path: Path) -> None:
    with postgresql_database() as url:
        api = Services.of(
            Settings(data_dir=tmp_path / "data", database_url=url, workers=0, presigned_downloads=True)
        )
        with api.opened():
            deleted = finished(api, tmp_path)
            api.removal.delete_job("default", deleted.id)
            job = queue(api, 1, script={})
            worker = Workers(tmp_path / "data", ONNX_QAT_DATABASE_URL=url)
            try:
                # It tidies up at its start, before it has done the job.
                wait_until(lambda: api.jobs.get("default", job.id).state == "succeeded")
            finally:
                worker.stop()
            assert has_files(api, deleted)


def test_without_any_policy_yet_dates_of_an_earlier_version_stay(start: Start, tmp_path: Path) -> None:
    services = start()
    with services.opened():
        job = finished(services, tmp_path)
        date = now() + DAY
        with services.database.writing() as session:
            row = job_rows.get(session, job.id)
            assert row is not None
            row.expires_at = date
        services.maintenance.run_once()
        assert services.jobs.get("default", job.id).expires_at == date


def test_a_download_that_has_begun_is_not_cut_off(services: Services, tmp_path: Path) -> None:
    job = finished(services, tmp_path)
    chunks = services.store.read(result_key(job.id, 1, "files/a"), 0, 6)
    services.removal.delete_job("default", job.id)
    services.store.delete_all(f"results/{job.id}/")
    assert not has_files(services, job)
    assert b"".join(chunks) == b"result"


def test_files_of_a_deleted_job_go_although_the_process_dies_before_that(
    services: Services, tmp_path: Path, jump: Jump, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finished(services, tmp_path)
    services.removal.delete_job("default", job.id)
    jump(DAY)

    def die(*arguments: object) -> None:
        raise RuntimeError("the process dies here")

    for module, name in ((type(services.store), "delete_all"), (repository, "forget_removal")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with pytest.raises(RuntimeError):
                services.removal.remove_results()
    services.removal.remove_results()
    assert not has_files(services, job)
    with services.database.reading() as session:
        assert repository.due_removals(session, now() + DAY, now() + DAY) == []


def test_clocks_that_are_set_back_do_not_keep_files_for_long(
    services: Services, tmp_path: Path, jump: Jump
) -> None:
    job = finished(services, tmp_path)
    jump(100 * DAY)
    services.removal.delete_job("default", job.id)
    jump(datetime.timedelta())
    services.removal.remove_results()
    assert not has_files(services, job)


def test_the_same_work_comes_while_its_job_is_deleted(services: Services, tmp_path: Path) -> None:
    """The answer is the old job, which is deleted after that, or a new one."""
    for number in range(5):
        job = finished(services, tmp_path, number)
        deleter = threading.Thread(target=services.removal.delete_job, args=("default", job.id))
        deleter.start()
        answer = services.jobs.submit("default", job.request)
        deleter.join()
        assert answer.id != job.id or not has_job(services, job)
        if answer.id != job.id:
            assert services.jobs.cancel("default", answer.id).state == "cancelled"


def test_a_job_never_loses_an_input_between_its_check_and_its_start(services: Services) -> None:
    """Either the job is refused for want of its input, or the input is kept for it."""
    for number in range(5):
        model = store(services, UploadKind.MODEL, "model.onnx", json.dumps(number).encode())
        refusals: list[str] = []

        def delete(model: str = model, refusals: list[str] = refusals) -> None:
            try:
                services.removal.delete_upload("default", UploadKind.MODEL, model)
            except ServiceError as error:
                refusals.append(error.cause.code)

        deleter = threading.Thread(target=delete)
        deleter.start()
        was_taken = False
        with contextlib.suppress(ServiceError):
            services.jobs.submit("default", PrepareRequest(kind="prepare", model=model))
            was_taken = True
        deleter.join()
        assert has_upload(services, UploadKind.MODEL, model) is was_taken
        assert refusals == (["upload_in_use"] if was_taken else [])


def test_a_string_that_postgresql_cannot_decode_stops_nothing(
    services: Services, tmp_path: Path, jump: Jump
) -> None:
    """Versions before took it in recipes."""
    deleted, expired = finished(services, tmp_path, 1), finished(services, tmp_path, 2)
    job = queue(services, 3)
    with services.database.writing() as session:
        row = job_rows.get(session, job.id)
        assert row is not None
        row.request = {**row.request, "recipe": {"scope": "a\0b"}}
    listed = services.jobs.page("default", state=None, cursor=None, limit=10).items
    assert [each.id for each in listed] == [job.id, expired.id, deleted.id]
    assert services.jobs.summary("default", job.id) == listed[0]
    assert services.jobs.changes({job.id: -1}) == {job.id: listed[0]}
    services.removal.delete_job("default", deleted.id)
    jump(31 * DAY)
    services.removal.expire_jobs()
    assert not has_job(services, expired)


def test_a_job_that_cannot_be_removed_keeps_no_other(
    services: Services, tmp_path: Path, jump: Jump, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [finished(services, tmp_path, number) for number in range(3)]
    delete_job = repository.delete_job

    def delete(session: Any, row: Any, due_at: datetime.datetime) -> None:
        delete_job(session, row, due_at)
        if row.id == jobs[1].id:
            raise ValueError

    monkeypatch.setattr(repository, "delete_job", delete)
    jump(31 * DAY)
    services.removal.expire_jobs()
    assert [has_job(services, job) for job in jobs] == [False, True, False]
    monkeypatch.undo()
    jump(31 * DAY)
    services.removal.expire_jobs()
    assert not has_job(services, jobs[1])


def test_several_processes_may_tidy_up_at_once(services: Services, tmp_path: Path, jump: Jump) -> None:
    jobs = [finished(services, tmp_path, number) for number in range(6)]
    jump(31 * DAY)
    threads = [threading.Thread(target=services.maintenance.run_once) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(has_job(services, job) for job in jobs)


def test_a_step_that_fails_does_not_keep_the_others_from_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr("service.retention.maintenance.log", log)
    done: list[str] = []

    def fail() -> None:
        raise OSError("a mistake")

    def find_nobody() -> None:
        raise StoreUnavailableError("no answer")

    maintenance = Maintenance({"a": fail, "b": find_nobody, "c": lambda: done.append("c")})
    maintenance.run_once()
    assert done == ["c"]
    # A server that is away is no mistake of ours: a line, without a traceback.
    calls = [(call.kwargs["step"], call.method_name) for call in log.calls]
    assert calls == [("a", "exception"), ("b", "warning")]


def test_what_dead_processes_left_is_removed_and_what_living_ones_use_is_not(
    services: Services,
) -> None:
    abandoned = [services.data.staging / "x", services.data.scratch / "y", services.data.inputs / "z"]
    for directory in abandoned:
        directory.mkdir()
        (directory / "file").write_text("left")
    with services.data.staged() as used:
        (used / "file").write_text("used")
        services.maintenance.run_once()
        assert (used / "file").read_text() == "used"
    assert not any(directory.exists() for directory in abandoned)
