"""A job's changes as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Final

import anyio
import anyio.to_thread

from service.jobs.models import FINISHED
from service.jobs.service import JobService

_POLL_SECONDS: Final = 0.25
# A comment now and then keeps proxies from closing a quiet connection.
_KEEP_ALIVE_SECONDS: Final = 15.0


async def job_events(jobs: JobService, job_id: str, last_revision: int | None) -> AsyncIterator[str]:
    """The job now, unless the reader has seen it, then each change, until the job has ended."""
    sent_at = time.monotonic()
    while True:
        job = await anyio.to_thread.run_sync(jobs.get, job_id)
        if job.revision != last_revision:
            last_revision = job.revision
            sent_at = time.monotonic()
            yield f"id: {job.revision}\nevent: job\ndata: {job.model_dump_json()}\n\n"
        elif time.monotonic() - sent_at > _KEEP_ALIVE_SECONDS:
            sent_at = time.monotonic()
            yield ": still here\n\n"
        if job.state in FINISHED:
            return
        await anyio.sleep(_POLL_SECONDS)
