"""Jobs' changes as server-sent events: all streams of a process share one look into the database."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import anyio
import anyio.to_thread
import structlog

from service.errors import ServiceError, ServiceErrorCode
from service.jobs.schemas import JobSummary
from service.jobs.service import JobService
from service.jobs.states import FINISHED
from service.unavailable import DATABASE_UNAVAILABLE

log = structlog.get_logger()

_POLL_SECONDS: Final = 0.25
# A comment now and then keeps proxies from closing a quiet connection.
_KEEP_ALIVE_SECONDS: Final = 15.0
_RETRY_SECONDS: Final = 5


class _Followed:
    """A job that streams follow, as it was when last looked at."""

    def __init__(self, job: JobSummary) -> None:
        self.job = job
        self.event = _event(job)
        self.is_over = False
        """Nothing more will be told of it."""
        self.changed = asyncio.Event()
        """Set when this is no longer the latest; the next state has another one."""
        self.streams = 0

    def become(self, job: JobSummary) -> None:
        self.job, self.event = job, _event(job)
        self._wake()

    def end(self) -> None:
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class JobEvents:
    """The streams of this process's clients. Used from its event loop alone."""

    def __init__(self, jobs: JobService, closing: threading.Event, most_per_tenant: int) -> None:
        """
        Args:
            closing: when it is set the streams end; their readers go on where another process answers.
        """
        self._jobs = jobs
        self._closing = closing
        self._most = most_per_tenant
        self._open: Counter[str] = Counter()
        self._followed: dict[str, _Followed] = {}
        self._watching: asyncio.Task[None] | None = None

    @contextmanager
    def admitted(self, tenant: str) -> Iterator[None]:
        """Count one stream.

        Raises:
            ServiceError: `event_streams_exceeded`.
        """
        if self._open[tenant] >= self._most:
            raise ServiceError(
                ServiceErrorCode.EVENT_STREAMS_EXCEEDED,
                f"You follow {self._most} jobs already, as many as you may; leave one, or ask for "
                "GET /v1/jobs/{id} now and then.",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            self._open += Counter()  # drops who has none

    async def stream(self, job: JobSummary, seen: int | None) -> AsyncIterator[str]:
        """The job as it is now, unless the reader has seen that, then each change, until the job has ended.

        Of changes in quick succession the last is told. The stream ends early when the job is deleted, when
        the database does not answer, and when this process is closing.
        """
        with self._following(job) as followed:
            while True:
                changed = followed.changed
                is_last = followed.is_over or followed.job.state in FINISHED
                if followed.job.revision != seen:
                    seen = followed.job.revision
                    yield followed.event
                if is_last:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), _KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield ": still here\n\n"

    @contextmanager
    def _following(self, job: JobSummary) -> Iterator[_Followed]:
        followed = self._followed.setdefault(job.id, _Followed(job))
        if followed.job.revision < job.revision:
            followed.become(job)
        followed.streams += 1
        if self._watching is None:
            # It outlives the request that happens to begin it, and logs in its own name.
            self._watching = asyncio.create_task(self._watch(), context=contextvars.Context())
        try:
            yield followed
        finally:
            followed.streams -= 1
            if followed.streams == 0 and self._followed.get(job.id) is followed:
                del self._followed[job.id]

    async def _watch(self) -> None:
        """Look for changes for as long as somebody follows a job."""
        look = anyio.CapacityLimiter(1)  # not one of the threads that requests wait for
        try:
            while self._followed:
                is_last = self._closing.is_set()
                known = {job_id: followed.job.revision for job_id, followed in self._followed.items()}
                self._tell(await anyio.to_thread.run_sync(self._jobs.changes, known, limiter=look))
                if is_last:
                    return
                await asyncio.sleep(_POLL_SECONDS)
        except DATABASE_UNAVAILABLE as error:
            log.error("streams of events end: the database does not answer", error=str(error))
        except Exception:
            log.exception("streams of events end")
        finally:
            self._watching = None
            self._tell(dict.fromkeys(self._followed))

    def _tell(self, changes: Mapping[str, JobSummary | None]) -> None:
        for job_id, job in changes.items():
            followed = self._followed.get(job_id)
            if followed is None:
                continue  # nobody follows it any more
            if job is None:
                del self._followed[job_id]
                followed.end()
            elif job.revision > followed.job.revision:  # not what was read before a stream's own look
                followed.become(job)


def _event(job: JobSummary) -> str:
    return f"id: {job.revision}\nevent: job\ndata: {job.model_dump_json()}\n\n"
