"""Jobs: submitting, reading and cancelling them, and the changes of state that workers make."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
import uuid
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from service.database import Database, now
from service.errors import Cause, ServiceError, ServiceErrorCode
from service.jobs import repository
from service.jobs.models import FINISHED, JobKind, JobRow, JobState
from service.jobs.schemas import (
    FinalizeRequest,
    InspectRequest,
    Job,
    JobPage,
    JobRequest,
    PrepareRequest,
    Progress,
)
from service.storage import DataDirectory
from service.uploads.models import UploadKind
from service.uploads.schemas import StoredFile
from service.uploads.service import UploadService

log = structlog.get_logger()

_REQUEST: Final[TypeAdapter[JobRequest]] = TypeAdapter(JobRequest)
_NOT_STARTED: Final[dict[str, Any]] = {"stage": None, "fraction": 0.0, "started_at": None}
# The other inputs of a result: another version may make another bundle.
_VERSION: Final = importlib.metadata.version("onnx-qat")


class JobService:
    """All that happens to a job. Safe to use from several threads."""

    def __init__(self, database: Database, data: DataDirectory, uploads: UploadService) -> None:
        self.queued = threading.Event()
        """Set when there may be a job to run."""
        self._database = database
        self._data = data
        self._uploads = uploads

    # What clients ask.

    def submit(
        self, request: PrepareRequest | FinalizeRequest | InspectRequest, key: str | None = None
    ) -> Job:
        """Queue a job, or return the one that does the same work or was submitted under the same key.

        The job is in the database when this returns.

        Raises:
            ServiceError: `model_not_found`, `data_not_found`, `checkpoint_not_found`, `job_not_found`,
                `job_not_succeeded`, `job_kind_unavailable`, `idempotency_key_reused`.
        """
        if isinstance(request, InspectRequest):
            raise ServiceError(
                ServiceErrorCode.JOB_KIND_UNAVAILABLE,
                "Jobs of the kind 'inspect' are not available in this version; use 'prepare' or 'finalize'.",
                field="kind",
            )
        self._check_inputs(request)
        content = request.model_dump(mode="json")
        digest = _digest(content)
        with self._database.writing() as session:
            row = _keyed_job(session, key, digest) or repository.find_answering(session, digest)
            is_new = row is None
            if row is None:
                row = JobRow(
                    id=uuid.uuid4().hex, kind=request.kind.value, request=content, request_digest=digest
                )
                repository.add(session, row)
            if key is not None and repository.find_key(session, key) is None:
                repository.add_key(session, key, row)
        log.info("job submitted", job=row.id, kind=row.kind, new=is_new)
        self.queued.set()
        return _job(row)

    def get(self, job_id: str) -> Job:
        """Raises: ServiceError: `job_not_found`."""
        with self._database.reading() as session:
            return _job(_found(repository.find(session, job_id)))

    def page(self, *, state: JobState | None, cursor: int | None, limit: int) -> JobPage:
        """Jobs, the newest first."""
        with self._database.reading() as session:
            rows = repository.page(session, state=state, cursor=cursor, limit=limit + 1)
        more = len(rows) > limit
        rows = rows[:limit]
        return JobPage(items=[_job(row) for row in rows], next=rows[-1].number if more else None)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; its process is killed by the worker that runs it.

        Raises:
            ServiceError: `job_not_found`, `job_finished`.
        """
        with self._database.writing() as session:
            unfinished = [JobState.QUEUED, JobState.RUNNING]
            if repository.change(
                session, job_id, unfinished, state=JobState.CANCELLED.value, finished_at=now()
            ):
                log.info("job cancelled", job=job_id)
                return _job(_found(repository.find(session, job_id)))
            row = _found(repository.find(session, job_id))
        raise ServiceError(ServiceErrorCode.JOB_FINISHED, f"The job has already {_PAST[row.state]}.")

    def result_file(self, job_id: str, name: str) -> tuple[Path, StoredFile]:
        """One file of a succeeded job's result.

        Raises:
            ServiceError: `job_not_found`, `job_not_succeeded`, `file_not_found`.
        """
        job = self._succeeded(job_id)
        for file in job.files:
            if file.name == name:
                return self.result_directory(job_id) / "files" / name, file
        raise ServiceError(
            ServiceErrorCode.FILE_NOT_FOUND,
            f"The job made no such file; it made {', '.join(file.name for file in job.files)}.",
            file=name,
        )

    def bundle(self, job_id: str) -> tuple[Path, StoredFile]:
        """The zip of a prepare job's bundle; errors as for `result_file`."""
        job = self._succeeded(job_id)
        if job.bundle is None:
            raise ServiceError(
                ServiceErrorCode.FILE_NOT_FOUND,
                f"A {job.kind} job makes no bundle; get its files one by one.",
            )
        return self.result_directory(job_id) / job.bundle.name, job.bundle

    def result_directory(self, job_id: str) -> Path:
        """Where the result of a succeeded job is."""
        return self._data.result(job_id)

    # What workers report.

    def claim(self) -> Job | None:
        """Take the oldest queued job to run it."""
        with self._database.writing() as session:
            row = repository.oldest_queued(session)
            if row is None:
                return None
            repository.change(
                session, row.id, [JobState.QUEUED], state=JobState.RUNNING.value, started_at=now()
            )
            session.refresh(row)
            return _job(row)

    def is_running(self, job_id: str) -> bool:
        """False as soon as the job was cancelled."""
        return self.get(job_id).state is JobState.RUNNING

    def advance(self, job_id: str, progress: Progress) -> None:
        """Record the progress of a running job."""
        with self._database.writing() as session:
            repository.change(session, job_id, [JobState.RUNNING], **progress.model_dump())

    def succeed(self, job_id: str, files: list[StoredFile], bundle: StoredFile | None) -> bool:
        """End a running job whose result is in place; false when it was cancelled meanwhile."""
        return self._finish(
            job_id,
            state=JobState.SUCCEEDED.value,
            fraction=1.0,
            files=[file.model_dump() for file in files],
            bundle=None if bundle is None else bundle.model_dump(),
        )

    def fail(self, job_id: str, failure: Cause) -> bool:
        """End a running job without a result; false when it was cancelled meanwhile."""
        return self._finish(
            job_id, state=JobState.FAILED.value, failure=failure.model_dump(mode="json", exclude_none=True)
        )

    def requeue(self, job_id: str) -> None:
        """Put a running job back into the queue, to run again from its start."""
        with self._database.writing() as session:
            repository.change(
                session, job_id, [JobState.RUNNING], state=JobState.QUEUED.value, **_NOT_STARTED
            )

    def recover(self) -> None:
        """Queue what was running when the last service died."""
        with self._database.writing() as session:
            for job_id in repository.requeue_running(session, **_NOT_STARTED):
                log.info("job queued again after a restart", job=job_id)

    def _finish(self, job_id: str, **values: Any) -> bool:
        with self._database.writing() as session:
            return repository.change(session, job_id, [JobState.RUNNING], finished_at=now(), **values)

    def _succeeded(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job.state is not JobState.SUCCEEDED:
            raise ServiceError(
                ServiceErrorCode.JOB_NOT_SUCCEEDED, f"The job is {job.state}; only a succeeded job has files."
            )
        return job

    def _check_inputs(self, request: PrepareRequest | FinalizeRequest) -> None:
        if isinstance(request, PrepareRequest):
            self._check_upload(UploadKind.MODEL, request.model)
            self._check_upload(UploadKind.DATASET, request.calibration)
            return
        prepared = self._succeeded(request.prepare_job)
        if prepared.kind is not JobKind.PREPARE:
            raise ServiceError(
                ServiceErrorCode.REQUEST_INVALID,
                "The job to finalize is not a prepare job.",
                field="prepare_job",
            )
        self._check_upload(UploadKind.CHECKPOINT, request.checkpoint)
        self._check_upload(UploadKind.DATASET, request.verify)

    def _check_upload(self, kind: UploadKind, identifier: str | None) -> None:
        if identifier is not None:
            self._uploads.get(kind, identifier)


_PAST: Final = {state.value: state.value for state in FINISHED} | {"cancelled": "been cancelled"}


def _keyed_job(session: Session, key: str | None, digest: str) -> JobRow | None:
    known = None if key is None else repository.find_key(session, key)
    if known is None:
        return None
    if known.request_digest != digest:
        raise ServiceError(
            ServiceErrorCode.IDEMPOTENCY_KEY_REUSED,
            "The Idempotency-Key was used for another request; take a new key for each request.",
            field="Idempotency-Key",
        )
    return repository.get_by_number(session, known.job_number)


def _digest(request: dict[str, Any]) -> str:
    text = json.dumps({"version": _VERSION, **request}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _found(row: JobRow | None) -> JobRow:
    if row is None:
        raise ServiceError(ServiceErrorCode.JOB_NOT_FOUND, "There is no job with this id.")
    return row


def _job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        kind=JobKind(row.kind),
        state=JobState(row.state),
        progress=Progress(stage=row.stage, fraction=row.fraction),
        failure=None if row.failure is None else Cause.model_validate(row.failure),
        request=_REQUEST.validate_python(row.request),
        files=[StoredFile.model_validate(file) for file in row.files],
        bundle=None if row.bundle is None else StoredFile.model_validate(row.bundle),
        revision=row.revision,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
