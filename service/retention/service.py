"""What is no longer wanted goes: on request, and by itself when its time is over.

Rows go first, in one transaction, and with them all that could lead somebody to the files; the files
follow after a while. A download that has begun is not cut off: locally it holds the file open, and S3 sends
an object to its end. The while is for requests that have found the row and not yet opened the file, and
for links to S3 that clients hold.
"""

from __future__ import annotations

import datetime
from typing import Final

import structlog
from sqlalchemy.orm import Session

from service.database import Database, now
from service.errors import ServiceError, ServiceErrorCode
from service.jobs import repository as jobs
from service.jobs.models import JobRow
from service.jobs.states import FINISHED, JobState
from service.retention import repository
from service.retention.policy import Retention
from service.settings import Settings
from service.storage.store import Store, results_key
from service.unavailable import DATABASE_UNAVAILABLE
from service.uploads.kinds import UploadKind
from service.uploads.service import UploadService, found

log = structlog.get_logger()

GRACE_SECONDS = 60.0
"""How long files outlive their rows."""
# Content is stored before the upload that has it; the time is for that.
_UPLOAD_GRACE: Final = datetime.timedelta(hours=1)


class RemovalService:
    """Safe to use from several threads and processes: what one removes the others do not find."""

    def __init__(
        self,
        database: Database,
        store: Store,
        uploads: UploadService,
        retention: Retention,
        settings: Settings,
    ) -> None:
        self._database = database
        self._store = store
        self._uploads = uploads
        self._retention = retention
        # Several APIs may serve, and one whose environment lacks the setting says nothing about it. On SQLite
        # there is no other: what is not set is for ever.
        self._has_say = database.is_sqlite or "retention_days" in settings.model_fields_set
        self._days = settings.retention_days
        self._grace = datetime.timedelta(
            seconds=GRACE_SECONDS + (settings.presigned_seconds if settings.presigned_downloads else 0)
        )

    # At the start.

    def adopt_policy(self) -> None:
        """Make this process's setting that of all: for processes that serve."""

        def adopt(session: Session) -> None:
            if self._has_say:
                repository.set_policy(session, self._days)
            session.flush()
            self._retention.read(session)

        self._database.write(adopt)
        span = self._retention.span
        kept = "for ever" if span is None else f"{span / datetime.timedelta(days=1):g} days"
        log.info("retention of finished jobs", kept=kept, set_here=self._has_say)

    def read_policy(self) -> None:
        """Go by what processes that serve have set."""
        with self._database.reading() as session:
            self._retention.read(session)

    # What clients ask.

    def delete_job(self, tenant: str, job_id: str) -> None:
        """Remove a finished job and its files.

        Raises:
            ServiceError: `job_not_found`, `job_not_finished`, `job_in_use`.
        """
        with self._database.writing() as session:
            row = jobs.lock(session, tenant, job_id)
            if row is None:
                raise ServiceError(ServiceErrorCode.JOB_NOT_FOUND, "There is no job with this id.")
            if JobState(row.state) not in FINISHED:
                raise ServiceError(
                    ServiceErrorCode.JOB_NOT_FINISHED, f"The job is {row.state}; cancel it first."
                )
            if repository.is_job_needed(session, row):
                raise ServiceError(
                    ServiceErrorCode.JOB_IN_USE,
                    "A job that is not finished builds on this one; wait for it, or cancel it first.",
                )
            repository.delete_job(session, row, now() + self._grace)
        log.info("job deleted", job=job_id)

    def delete_upload(self, tenant: str, kind: UploadKind, identifier: str) -> None:
        """Remove an upload, also one that finished jobs were made from.

        Raises:
            ServiceError: `model_not_found`, `data_not_found` or `checkpoint_not_found`, `upload_in_use`.
        """
        with self._database.writing() as session:
            row = found(repository.lock_upload(session, tenant, kind, identifier), kind)
            if repository.is_upload_read(session, row, by_finished=False):
                raise ServiceError(
                    ServiceErrorCode.UPLOAD_IN_USE,
                    "A job that is not finished reads this upload; wait for it, or cancel it first.",
                )
            session.delete(row)
        log.info("upload deleted", kind=kind.value, upload=identifier)

    # What is done from time to time.

    def expire_jobs(self) -> None:
        """Remove finished jobs whose time is over, unless an unfinished one builds on them.

        A policy that was changed holds for what is there: a shorter time at once, from now; none for
        all; a longer one for jobs that finish from now on. As long as nobody has set one, dates stay.
        """
        with self._database.writing() as session:
            if self._retention.read(session):
                repository.limit_expiry(session, self._retention.expiry())
        last = 0
        while True:
            with self._database.writing() as session:
                row = repository.lock_expired_job(session, now(), last)
                if row is None:
                    return
                last = row.number
                self._expire(session, row)

    def _expire(self, session: Session, row: JobRow) -> None:
        """Remove a job; what is wrong with it keeps no other from being removed."""
        job_id = row.id
        try:
            with session.begin_nested():
                if repository.is_job_needed(session, row):
                    return
                repository.delete_job(session, row, now() + self._grace)
        except DATABASE_UNAVAILABLE:
            raise
        except Exception:
            log.exception("job does not expire", job=job_id)
        else:
            log.info("job expired", job=job_id)

    def expire_uploads(self) -> None:
        """Remove uploads that nobody has used for the time of retention and no job reads that is kept."""
        with self._database.reading() as session:
            self._retention.read(session)
            span = self._retention.span
            if span is None:
                return
            before = now() - span
            unused = repository.unused_uploads(session, before)
        for tenant, kind, identifier in unused:
            with self._database.writing() as session:
                row = repository.lock_upload(session, tenant, UploadKind(kind), identifier)
                if (
                    row is not None
                    and row.used_at < before
                    and not repository.is_upload_read(session, row, by_finished=True)
                ):
                    session.delete(row)
                    log.info("upload expired", kind=kind, upload=identifier)

    def remove_results(self) -> None:
        """Remove the files of jobs that have been gone for a while."""
        at = now()
        with self._database.reading() as session:
            due = repository.due_removals(session, at, at + self._grace)
        for job_id in due:
            # The row last: should this fail half-way, the next call does it again.
            self._store.delete_all(results_key(job_id))
            with self._database.writing() as session:
                repository.forget_removal(session, job_id)

    def remove_contents(self) -> None:
        """Remove content that belongs to no upload any more."""
        self._uploads.remove_unreferenced(_UPLOAD_GRACE)
