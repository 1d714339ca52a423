"""Streams of events: what ends them, how many there may be, and that they share one look for changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest.mock import Mock

import pytest
from service_helpers import Server, assert_problem, submit, wait_for, wait_until
from sqlalchemy.exc import OperationalError

from service.jobs import events
from service.jobs.events import JobEvents
from service.jobs.schemas import JobSummary
from service.jobs.service import JobService
from service.jobs.states import JobState
from service.openapi_examples import _summary

T = TypeVar("T")


class Jobs:
    """A `JobService` whose jobs change when the test says so."""

    def __init__(self) -> None:
        self.now: dict[str, JobSummary] = {}
        self.looks = 0
        self.failure: Exception | None = None
        self.answering = threading.Event()
        """Set: a look is answered at once; else later, with what was there when it began."""
        self.answering.set()

    def changes(self, known: Mapping[str, int]) -> dict[str, JobSummary | None]:
        if self.failure is not None:
            raise self.failure
        changes = {
            job_id: self.now.get(job_id)
            for job_id, revision in known.items()
            if job_id not in self.now or self.now[job_id].revision != revision
        }
        self.looks += 1
        self.answering.wait(10)
        return changes

    def add(self, number: int) -> JobSummary:
        return self.become(_summary("running").model_copy(update={"id": f"{number:032x}"}))

    def become(self, job: JobSummary, **changes: Any) -> JobSummary:
        job = job.model_copy(update={"revision": job.revision + 1, **changes})
        self.now[job.id] = job
        return job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(events, "_POLL_SECONDS", 0.05)
    return Jobs()


def streams_of(jobs: Jobs, most: int = 1000) -> JobEvents:
    return JobEvents(cast(JobService, jobs), threading.Event(), most)


async def told(streams: JobEvents, job: JobSummary, seen: int | None = None) -> list[str]:
    return [event async for event in streams.stream(job, seen)]


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; not for ever, see `run`."""
    while not condition():
        await asyncio.sleep(0.01)


def run(test: Coroutine[Any, Any, T]) -> T:
    """What a stream that does not end makes fail, and not wait for ever."""
    return asyncio.run(asyncio.wait_for(test, 30))


def test_all_streams_share_one_look(jobs: Jobs) -> None:
    async def follow() -> list[list[str]]:
        streams = streams_of(jobs)
        running = [jobs.add(number) for number in range(20)]
        readers = [asyncio.create_task(told(streams, job)) for job in running * 10]
        await asyncio.sleep(0.5)
        for job in running:
            jobs.become(job, state=JobState.SUCCEEDED)
        return await asyncio.gather(*readers)

    heard = run(follow())
    assert len(heard) == 200
    assert all(len(each) == 2 for each in heard)
    assert jobs.looks <= 15


def test_nobody_looks_when_nobody_follows(jobs: Jobs) -> None:
    async def follow() -> None:
        streams = streams_of(jobs)
        job = jobs.add(1)
        for _ in range(2):  # and it begins anew with the next one
            reader = asyncio.create_task(told(streams, job))
            await until(lambda: jobs.looks)
            reader.cancel()
            await until(lambda: streams._watching is None)
            looks = jobs.looks
            await asyncio.sleep(0.2)
            assert jobs.looks == looks
            jobs.looks = 0

    run(follow())


def test_a_stream_that_comes_later_is_told_what_is_newer_and_so_are_the_others(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not with the next look."""
    monkeypatch.setattr(events, "_POLL_SECONDS", 600)

    async def follow() -> tuple[list[str], list[str]]:
        streams = streams_of(jobs)
        earlier: list[str] = []
        later: list[str] = []

        async def read(job: JobSummary, seen: int | None, heard: list[str]) -> None:
            async for event in streams.stream(job, seen):
                heard.append(event)

        first = jobs.add(1)
        readers = [asyncio.create_task(read(first, None, earlier))]
        await until(lambda: earlier and jobs.looks)
        second = jobs.become(first)
        readers.append(asyncio.create_task(read(second, first.revision, later)))
        await until(lambda: len(earlier) > 1 and later)
        await asyncio.sleep(0.1)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        return earlier, later

    earlier, later = run(follow())
    assert (len(earlier), len(later)) == (2, 1)
    assert earlier[1:] == later
    assert jobs.looks == 1


def test_a_look_that_began_before_a_stream_tells_nothing_older(jobs: Jobs) -> None:
    async def follow() -> tuple[list[str], list[str]]:
        streams = streams_of(jobs)
        first = jobs.add(1)
        earlier = asyncio.create_task(told(streams, first))
        await until(lambda: jobs.looks)
        jobs.answering.clear()
        second = jobs.become(first)
        looks = jobs.looks
        while jobs.looks == looks:  # none is under way: they are answered at once
            await asyncio.sleep(0.01)
        third = jobs.become(second)
        later = asyncio.create_task(told(streams, third))
        await asyncio.sleep(0.1)
        looks = jobs.looks
        jobs.answering.set()
        await until(lambda: jobs.looks > looks)
        jobs.become(third, state=JobState.SUCCEEDED)
        return await earlier, await later

    earlier, later = run(follow())
    assert (len(earlier), len(later)) == (3, 2)
    assert earlier[1:] == later


def test_streams_end_when_the_database_does_not_answer(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Mock()
    monkeypatch.setattr(events, "log", log)

    async def follow() -> list[list[str]]:
        streams = streams_of(jobs)
        readers = [asyncio.create_task(told(streams, jobs.add(number))) for number in range(3)]
        await asyncio.sleep(0.2)
        jobs.failure = OperationalError("SELECT 1", {}, Exception("gone"))
        return await asyncio.gather(*readers)

    assert [len(each) for each in run(follow())] == [1, 1, 1]
    assert [call[0] for call in log.method_calls] == ["error"]  # one line, no traceback


def test_a_stream_ends_with_the_deletion_of_its_job(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    server = start_server(log)
    with server.client() as client:
        busy = submit(client, {"seconds": 600})
        wait_for(client, busy, "running")
        job = submit(client, {"seconds": 1})
        with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "id: 0"
            # Both before the next look: the stream does not see the end of the job.
            client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
            client.delete(f"/v1/jobs/{job}").raise_for_status()
            rest = list(lines)
        assert rest[-1] == ""
        client.post(f"/v1/jobs/{busy}/cancel")
    assert "Traceback" not in log.read_text()


def test_a_tenant_follows_so_many_jobs_at_a_time(start_server: Callable[..., Server]) -> None:
    server = start_server(ONNX_QAT_MAX_EVENT_STREAMS="2")
    with server.client() as client:
        job = submit(client, {"seconds": 600})
        path = f"/v1/jobs/{job}/events"
        with ExitStack() as stack:
            for _ in range(2):
                assert stack.enter_context(client.stream("GET", path)).status_code == 200
            refused = client.get(path)
            assert_problem(refused, 429, "event_streams_exceeded")
            assert int(refused.headers["retry-after"]) > 0
            assert client.get(f"/v1/jobs/{job}").status_code == 200

        def is_admitted() -> bool:
            with client.stream("GET", path) as answer:
                return answer.status_code == 200

        wait_until(is_admitted)
        client.post(f"/v1/jobs/{job}/cancel")


def test_who_has_seen_the_end_is_told_not_to_come_again(start_server: Callable[..., Server]) -> None:
    """204 is what keeps an EventSource from connecting again (HTML standard, section 9.2.3)."""
    # A server of its own: of one in this process a stream that does not end would be waited for for ever.
    with start_server().client() as client:
        job = submit(client, {"do": "fail"})
        revision = wait_for(client, job)["revision"]
        path = f"/v1/jobs/{job}/events"
        seen = client.get(path, headers={"Last-Event-ID": str(revision)})
        assert (seen.status_code, seen.content) == (204, b"")
        for last in (str(revision - 1), ""):
            assert f"id: {revision}" in client.get(path, headers={"Last-Event-ID": last}).text
        assert_problem(client.get(path, headers={"Last-Event-ID": "x"}), 422, "request_invalid")
