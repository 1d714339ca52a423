"""A job whose worker is lost runs again, exactly one outcome counts, and no two clocks are compared."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from servers import postgresql_database
from service_helpers import Server, Workers, is_running, queue, submit, wait_for, wait_for_pid, wait_until
from sqlalchemy import select

from service.errors import Cause, ServiceErrorCode
from service.jobs.leases import Claim
from service.jobs.models import JobRow
from service.jobs.schemas import Progress
from service.jobs.states import JobState
from service.metrics import instruments as metrics
from service.services import Services
from service.settings import Settings
from service.uploads.schemas import StoredFile
from service.worker.heart import Heart
from service.worker.reaper import Reaper

FAILURE = Cause(code=ServiceErrorCode.WORKER_CRASHED, detail="It crashed.")
FILE = StoredFile(name="a", bytes=1, sha256="a" * 64)
LEASE = 30.0


@pytest.fixture(params=["sqlite", "postgresql"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    """The service's parts without running workers."""
    if request.param == "sqlite":
        services = Services.of(Settings(data_dir=tmp_path))
        with services.opened():
            yield services
    else:
        with postgresql_database() as url:
            services = Services.of(Settings(data_dir=tmp_path, database_url=url))
            with services.opened():
                yield services


def claim(services: Services) -> Claim:
    claimed = services.leases.claim()
    assert claimed is not None
    return claimed


def reaper(services: Services) -> Reaper:
    return Reaper(services.leases, LEASE)


def watch(reaper: Reaper, seconds: float, start: float = 0) -> None:
    """Look as often as the reaper does on its own, with a clock of the test's."""
    step = LEASE / 6
    for number in range(int(seconds / step) + 1):
        reaper.look(start + number * step)


def test_each_job_is_taken_once_and_the_oldest_first(services: Services) -> None:
    jobs = [queue(services, number).id for number in range(12)]
    taken: list[str] = []

    def take() -> None:
        while (claimed := services.leases.claim()) is not None:
            taken.append(claimed.job.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(jobs)
    first, second = queue(services, 20), queue(services, 21)
    assert services.leases.claim(second.id) is not None
    assert services.leases.claim(second.id) is None
    assert claim(services).job.id == first.id


def test_a_job_of_another_version_whose_recipe_is_none_of_this_one_fails_and_the_next_is_taken(
    services: Services,
) -> None:
    first, also, second = (queue(services, number) for number in range(3))
    with services.database.writing() as session:
        for row in session.scalars(select(JobRow).where(JobRow.id.in_([first.id, also.id]))):
            row.request = {**row.request, "recipe": {"of_another_version": 1}}
    failures = metrics.JOBS_FINISHED.labels("prepare", "failed", "recipe_invalid")
    counted = failures._value.get()
    assert claim(services).job.id == second.id
    assert failures._value.get() == counted + 2
    with services.database.reading() as session:
        row = session.scalars(select(JobRow).where(JobRow.id == first.id)).one()
        assert row.state == JobState.FAILED
        assert row.failure is not None
        assert (row.failure["code"], row.failure["field"]) == ("recipe_invalid", "of_another_version")
        assert row.finished_at is not None


def test_a_stage_is_told_whatever_the_process_calls_it(services: Services) -> None:
    """PostgreSQL takes no text with NUL."""
    job = queue(services)
    services.leases.advance(claim(services), Progress(stage="a\0b", fraction=0.5))
    assert services.jobs.get("default", job.id).progress == Progress(stage="a�b", fraction=0.5)


def test_a_job_whose_heartbeat_stands_still_is_queued_again(services: Services) -> None:
    job = queue(services)
    first = claim(services)
    looking = reaper(services)
    watch(looking, LEASE - 6)
    assert services.leases.holds(first)
    watch(looking, 12, start=LEASE - 5)
    assert services.jobs.get("default", job.id).state == "queued"
    assert claim(services).job.attempt == 2


def test_a_job_whose_heart_beats_is_left_alone(services: Services) -> None:
    queue(services)
    held = claim(services)
    looking = reaper(services)
    for moment in range(0, 10 * int(LEASE), 5):
        if moment % 25 == 0:
            assert services.leases.beat(held)
        looking.look(moment)
    assert services.leases.holds(held)


def test_time_in_which_nobody_could_look_is_no_silence(services: Services) -> None:
    """The process was suspended, or the database was away: the workers may have stood still as well."""
    queue(services)
    held = claim(services)
    looking = reaper(services)
    looking.look(0)
    looking.look(1_000_000)
    assert services.leases.holds(held)


def test_a_worker_that_was_thought_lost_changes_nothing(services: Services) -> None:
    job = queue(services)
    lost = claim(services)
    watch(reaper(services), LEASE + 6)
    held = claim(services)
    assert not services.leases.holds(lost)
    assert not services.leases.beat(lost)
    services.leases.advance(lost, Progress(stage="lost", fraction=0.5))
    services.leases.give_back(lost)
    assert not services.leases.fail(lost, FAILURE)
    assert not services.leases.succeed(lost, [FILE], None)
    now = services.jobs.get("default", job.id)
    assert (now.state, now.attempt, now.progress.stage) == ("running", 2, None)
    assert services.leases.succeed(held, [FILE], None)
    assert not services.leases.succeed(lost, [], None)
    assert services.jobs.get("default", job.id).files == [FILE]


def test_an_outcome_may_be_reported_again_when_the_answer_was_lost(services: Services) -> None:
    queue(services)
    held = claim(services)
    assert services.leases.succeed(held, [FILE], None)
    assert services.leases.succeed(held, [FILE], None)
    assert not services.leases.fail(held, FAILURE)


def test_a_job_that_loses_its_worker_too_often_fails(services: Services) -> None:
    job = queue(services)
    for attempt in (1, 2, 3):
        assert claim(services).job.attempt == attempt
        watch(reaper(services), LEASE + 6)
    now = services.jobs.get("default", job.id)
    assert now.state == "failed"
    assert now.failure is not None
    assert now.failure.code == "worker_lost"
    assert now.finished_at is not None
    assert services.leases.claim() is None


def test_being_given_back_is_not_held_against_a_job(services: Services) -> None:
    job = queue(services)
    for _ in range(10):
        services.leases.give_back(claim(services))
    now = services.jobs.get("default", job.id)
    assert (now.state, now.attempt) == ("queued", 10)
    watch(reaper(services), LEASE + 6)
    claim(services)
    watch(reaper(services), LEASE + 6)
    assert services.jobs.get("default", job.id).state == "queued"


def test_the_heart_beats_and_learns_that_the_job_was_cancelled(services: Services) -> None:
    job = queue(services)
    held = claim(services)
    with Heart(services.leases, held, 0.02) as heart:
        wait_until(lambda: services.leases.pulses()[0].heartbeat > 3)
        assert not heart.lost.is_set()
        services.jobs.cancel("default", job.id)
        assert heart.lost.wait(20)


# In processes of their own.


def test_another_worker_finishes_the_job_of_a_killed_one(tmp_path: Path) -> None:
    with postgresql_database() as url, contextlib.ExitStack() as stack:
        environment = {"ONNX_QAT_DATABASE_URL": url, "ONNX_QAT_LEASE_SECONDS": "6"}
        server = Server(tmp_path / "data", ONNX_QAT_WORKERS="0", **environment)
        stack.callback(server.stop, signal.SIGKILL)
        workers = {}
        for _ in range(2):
            worker = Workers(tmp_path / "data", **environment)
            stack.callback(worker.stop, signal.SIGKILL)
            workers[worker.process.pid] = worker
        client = stack.enter_context(server.client())
        job = submit(client, {"seconds": 4})
        pid = wait_for_pid(client, job)
        workers[owner(url, job)].stop(signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        done = wait_for(client, job)
        assert done["state"] == "succeeded"
        assert done["attempt"] > 1
        assert client.get(f"/v1/jobs/{job}/bundle").is_success


def test_a_worker_that_comes_back_from_a_long_pause_changes_nothing(tmp_path: Path) -> None:
    """It was suspended for longer than its lease, with a result in its hands, and goes on."""
    with postgresql_database() as url, contextlib.ExitStack() as stack:
        environment = {"ONNX_QAT_DATABASE_URL": url, "ONNX_QAT_LEASE_SECONDS": "6"}
        services = Services.of(Settings(data_dir=tmp_path / "data", database_url=url))
        stack.enter_context(services.opened())
        paused = Workers(tmp_path / "data", **environment)
        stack.callback(paused.stop, signal.SIGKILL)
        job = queue(services, 3)
        wait_until(lambda: services.jobs.get("default", job.id).progress.stage)
        paused.process.send_signal(signal.SIGSTOP)
        other = Workers(tmp_path / "data", **environment)
        stack.callback(other.stop, signal.SIGKILL)
        wait_until(lambda: services.jobs.get("default", job.id).state == "succeeded")
        done = services.jobs.get("default", job.id)
        assert done.attempt > 1
        paused.process.send_signal(signal.SIGCONT)
        wait_until(lambda: not any((tmp_path / "data/scratch").iterdir()))
        results = tmp_path / "data/results" / job.id
        wait_until(lambda: [path.name for path in results.iterdir()] == [str(done.attempt)])
        assert services.jobs.get("default", job.id) == done


def test_a_worker_that_is_stopped_gives_its_job_back(tmp_path: Path) -> None:
    with postgresql_database() as url, contextlib.ExitStack() as stack:
        services = Services.of(Settings(data_dir=tmp_path / "data", database_url=url))
        stack.enter_context(services.opened())
        worker = Workers(tmp_path / "data", ONNX_QAT_DATABASE_URL=url, ONNX_QAT_SHUTDOWN_GRACE_SECONDS="0")
        stack.callback(worker.stop, signal.SIGKILL)
        job = queue(services, 600)
        wait_until(lambda: services.jobs.get("default", job.id).progress.stage)
        assert worker.stop(signal.SIGTERM) == 0
        assert services.jobs.get("default", job.id).state == "queued"
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT losses, attempt FROM jobs").fetchone() == (0, 1)


def owner(url: str, job: str) -> int:
    """Process id of the worker that runs a job."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT worker FROM jobs WHERE id = %s", [job]).fetchone()
    assert row is not None
    return int(row[0].split(":")[-2])


def test_workers_beside_a_service_on_sqlite_are_refused(start_server, tmp_path: Path) -> None:
    start_server()
    worker = Workers(tmp_path / "data")
    assert worker.process.wait(60) != 0
