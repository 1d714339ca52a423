"""Running jobs in the hands of workers, and what becomes of them when a worker is lost.

A job that is taken gets the next attempt number. Its worker raises the job's heartbeat every few seconds, and
all that it changes is changed on the condition that the job still runs in this attempt. A worker that was
thought lost and comes back thus changes nothing, and finds out with its next heartbeat.

Nobody compares clocks. Each process watches, by its own monotonic clock, for how long a job's attempt and
heartbeat have stayed the same (service/worker/reaper.py).
"""

from __future__ import annotations

import datetime
import os
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import structlog
from sqlalchemy.orm import Session

from rewriter import QatError
from service.database import Database, now
from service.errors import AnyErrorCode, Cause, ServiceErrorCode
from service.jobs import repository
from service.jobs.models import JobRow
from service.jobs.schemas import Job, Progress
from service.jobs.service import job_of, request_of
from service.jobs.states import JobKind, JobState
from service.metrics import instruments as metrics
from service.retention.policy import Retention
from service.uploads.schemas import StoredFile
from service.webhooks import outbox

log = structlog.get_logger()

_NOT_STARTED: Final[dict[str, Any]] = {
    "state": JobState.QUEUED.value,
    "stage": None,
    "fraction": 0.0,
    "started_at": None,
    "worker": None,
}

_MOST_QUEUED: Final = 5000


@dataclass(frozen=True)
class Claim:
    """A running job in the hands of its worker."""

    tenant: str
    job: Job
    request_id: str | None = None
    """Of the HTTP request that submitted the job."""
    trace_parent: str | None = None
    """That request's span (service/tracing.py)."""


class _Refused(NamedTuple):
    """A queued job that this version of the service cannot run."""

    job_id: str
    kind: JobKind
    cause: Cause


class Pulse(NamedTuple):
    """What a living worker changes."""

    job: str
    attempt: int
    heartbeat: int


def new_worker_name() -> str:
    """Machine and process, for a person, and what makes it unique: process ids are given out again."""
    return f"{socket.gethostname()[:40]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


class Leases:
    """What workers do with jobs. Safe to use from several threads and processes."""

    def __init__(self, database: Database, max_attempts: int, retention: Retention) -> None:
        self._database = database
        self._retention = retention
        self._max_attempts = max_attempts

    def queued(self) -> Sequence[str]:
        """Ids of the jobs that wait, the oldest first; not more than some thousands."""
        with self._database.reading() as session:
            return repository.queued(session, _MOST_QUEUED)

    def claim(self, job_id: str | None = None) -> Claim | None:
        """Take a queued job to run it: the one of that id, or the oldest. Nobody else gets the same.

        A job of another version of the service, whose recipe is none of this one, fails on the way.
        """
        while isinstance(claim := self._claim(job_id), _Refused):
            metrics.job_finished(claim.kind, JobState.FAILED, claim.cause.code, None)
            log.warning("job failed", job=claim.job_id, code=claim.cause.code, detail=claim.cause.detail)
        if claim is not None and claim.job.attempt == 1:
            waited = max(0.0, _seconds(claim.job.created_at, claim.job.started_at))
            metrics.WAIT_SECONDS.labels(claim.job.kind.value).observe(waited)
        return claim

    def _claim(self, job_id: str | None) -> Claim | _Refused | None:
        with self._database.writing() as session:
            row = repository.lock_queued(session, job_id)
            if row is None:
                return None
            row.state = JobState.RUNNING.value
            row.revision += 1
            row.attempt += 1
            row.started_at = now()
            row.worker = new_worker_name()
            session.flush()
            try:
                request_of(row)
            except QatError as error:
                cause = Cause.of(error)
                repository.change(session, row.id, [JobState.RUNNING], **self._failed(cause))
                return _Refused(row.id, JobKind(row.kind), cause)
            outbox.announce(session, row)
            return Claim(row.tenant, job_of(row), row.request_id, row.trace_parent)

    def holds(self, claim: Claim) -> bool:
        """False as soon as the job was cancelled, or was given to another worker."""
        with self._database.reading() as session:
            return repository.is_held(session, claim.job.id, claim.job.attempt)

    def beat(self, claim: Claim) -> bool:
        """Show that the worker lives; false as for `holds`."""
        with self._database.writing() as session:
            return repository.beat(session, claim.job.id, claim.job.attempt)

    def advance(self, claim: Claim, progress: Progress) -> None:
        """Record the progress of the job."""
        stage = progress.stage
        if stage is not None:  # in the words of the job's process, which may be hostile
            stage = "".join(character if character.isprintable() else "�" for character in stage)
        with self._database.writing() as session:
            _change(session, claim, {"stage": stage, "fraction": progress.fraction})

    def succeed(self, claim: Claim, files: list[StoredFile], bundle: StoredFile | None) -> bool:
        """End the job, whose result is in place; false when it is no longer the worker's.

        May be called again when it is not known whether the last call came through.
        """
        values = {
            "state": JobState.SUCCEEDED.value,
            "fraction": 1.0,
            "files": [file.model_dump() for file in files],
            "bundle": None if bundle is None else bundle.model_dump(),
            "result_bytes": sum(file.bytes for file in [*files, *([bundle] if bundle else [])]),
            "finished_at": now(),
            "expires_at": self._retention.expiry(),
        }
        with self._database.writing() as session:
            changed = _change(session, claim, values)
            if not changed:
                row = repository.get(session, claim.job.id)
                return row is not None and (row.state, row.attempt) == (JobState.SUCCEEDED, claim.job.attempt)
        _count_end(claim, JobState.SUCCEEDED)
        return True

    def fail(self, claim: Claim, failure: Cause) -> bool:
        """End the job without a result; false when it is no longer the worker's."""
        with self._database.writing() as session:
            failed = _change(session, claim, self._failed(failure))
        if failed:
            _count_end(claim, JobState.FAILED, failure.code)
        return failed

    def give_back(self, claim: Claim) -> None:
        """Put the job back into the queue, to run again from its start; nothing is held against it."""
        with self._database.writing() as session:
            returned = _change(session, claim, _NOT_STARTED)
        if returned:
            metrics.JOBS_REQUEUED.labels("returned").inc()

    def pulses(self) -> Sequence[Pulse]:
        """All running jobs."""
        with self._database.reading() as session:
            return [Pulse(row.id, row.attempt, row.heartbeat) for row in repository.running(session)]

    def lose(self, pulse: Pulse) -> None:
        """Take a job from a worker that shows no life: it is queued again, or fails when that is too often.

        Nothing happens when the worker has given a sign of life meanwhile.
        """
        with self._database.writing() as session:
            row = repository.lock_silent(session, *pulse)
            if row is None:
                return
            row.losses += 1
            row.revision += 1
            gone_for_good = row.losses >= self._max_attempts
            values = self._failed(_lost(row.losses)) if gone_for_good else _NOT_STARTED
            for name, value in values.items():
                setattr(row, name, value)
            session.flush()
            outbox.announce(session, row)
            kind, request_id = JobKind(row.kind), row.request_id
        log.warning(
            "worker lost", job=pulse.job, attempt=pulse.attempt, request=request_id, failed=gone_for_good
        )
        metrics.WORKERS_LOST.inc()
        if gone_for_good:
            metrics.job_finished(kind, JobState.FAILED, ServiceErrorCode.WORKER_LOST, None)
        else:
            metrics.JOBS_REQUEUED.labels("worker_lost").inc()

    def recover(self) -> None:
        """Take every running job from its worker: for a process that knows that there are none."""
        for pulse in self.pulses():
            self.lose(pulse)

    def _failed(self, failure: Cause) -> dict[str, Any]:
        return {
            "state": JobState.FAILED.value,
            "failure": failure.model_dump(mode="json", exclude_none=True),
            "finished_at": now(),
            "expires_at": self._retention.expiry(),
        }


def _change(session: Session, claim: Claim, values: dict[str, Any]) -> bool:
    job = claim.job
    return repository.change(session, job.id, [JobState.RUNNING], JobRow.attempt == job.attempt, **values)


def _count_end(claim: Claim, state: JobState, code: AnyErrorCode | None = None) -> None:
    metrics.job_finished(claim.job.kind, state, code, _seconds(claim.job.started_at, now()))


def _seconds(start: datetime.datetime | None, end: datetime.datetime | None) -> float:
    assert start is not None
    assert end is not None
    return (end - start).total_seconds()


def _lost(times: int) -> Cause:
    return Cause(
        code=ServiceErrorCode.WORKER_LOST,
        detail=f"The worker that ran the job was lost, {times} times in all. If others run well meanwhile, "
        "this job may be what ends them; use a smaller model or fewer calibration samples.",
    )
