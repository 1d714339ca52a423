"""Jobs as clients see them: submitted, read, cancelled. What workers do with them is in leases.py."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from rewriter import QatError, Recipe
from service import tracing
from service.database import Database, now
from service.errors import Cause, ServiceError, ServiceErrorCode
from service.jobs import repository
from service.jobs.models import JobRow
from service.jobs.schemas import (
    FinalizeRequest,
    Job,
    JobInputs,
    JobPage,
    JobRequest,
    JobSummary,
    PrepareInputs,
    PrepareRequest,
    Progress,
)
from service.jobs.states import FINISHED, UNFINISHED, JobKind, JobState
from service.logs import current_request_id
from service.metrics.instruments import JOBS_SUBMITTED, job_finished
from service.retention.policy import Retention
from service.storage.store import result_key
from service.tenants import quotas
from service.tenants import repository as tenants
from service.uploads.kinds import UploadKind
from service.uploads.schemas import StoredFile
from service.uploads.service import UploadService
from service.webhooks.schemas import Webhook
from service.webhooks.service import WebhookService

log = structlog.get_logger()

T = TypeVar("T")

_REQUEST: Final[TypeAdapter[JobRequest]] = TypeAdapter(JobRequest)
_INPUTS: Final[TypeAdapter[JobInputs]] = TypeAdapter(JobInputs)
_INPUT_FIELDS: Final = (PrepareInputs.model_fields.keys() | FinalizeRequest.model_fields.keys()) - {"kind"}
# The other inputs of a result: another version may make another bundle.
_VERSION: Final = importlib.metadata.version("onnx-qat")


@dataclass(frozen=True)
class _Wish:
    """Work that somebody wants done."""

    tenant: str
    request: PrepareRequest | FinalizeRequest
    key: str | None
    webhook: Webhook | None = None
    retry_of: str | None = None


class JobService:
    """Submits, finds and cancels jobs. Safe to use from several threads and processes."""

    def __init__(
        self,
        database: Database,
        uploads: UploadService,
        webhooks: WebhookService,
        retention: Retention,
    ) -> None:
        self.queued = threading.Event()
        """Set when there may be a job to run."""
        self._database = database
        self._uploads = uploads
        self._webhooks = webhooks
        self._retention = retention

    def submit(
        self,
        tenant: str,
        request: PrepareRequest | FinalizeRequest,
        key: str | None = None,
        webhook: Webhook | None = None,
    ) -> Job:
        """Queue a job, or return the one that does the same work or was submitted under the same key.

        The job is in the database when this returns. The webhook is told of the job in either case, beside
        those of others who submitted the same work.

        Raises:
            ServiceError: `model_not_found`, `data_not_found`, `checkpoint_not_found`, `job_not_found`,
                `job_not_succeeded`, `idempotency_key_reused`,
                `webhook_url_refused`, `webhook_secret_missing`, `webhook_limit_reached`,
                `job_quota_exceeded`, `storage_quota_exceeded`.
        """
        if webhook is not None:
            self._webhooks.check(webhook)
        wish = _Wish(tenant, request, key=key, webhook=webhook)
        return self._queue(wish)

    def retry(self, tenant: str, job_id: str, key: str | None = None) -> Job:
        """Queue the work of a failed or cancelled job again; whoever was told of that is told of the new one.

        Raises:
            ServiceError: `job_not_retryable`, and as for `submit`.
            QatError: `recipe_invalid`, `recipe_unsupported`: this version does not take the job's recipe.
        """
        with self._database.reading() as session:
            row = _found(repository.find(session, tenant, job_id))
        if row.state not in (JobState.FAILED, JobState.CANCELLED):
            raise ServiceError(
                ServiceErrorCode.JOB_NOT_RETRYABLE,
                f"The job is {row.state}; only a failed or a cancelled job can be retried.",
            )
        return self._queue(_Wish(tenant, request_of(row), key=key, retry_of=job_id))

    def _queue(self, wish: _Wish) -> Job:
        content = _content(wish.request)
        digest = _digest({"version": _VERSION, **content})
        # A key stands for a request: to retry is another one than to submit the same work.
        key_digest = _digest(_sent(wish.request) if wish.retry_of is None else {"retry": wish.retry_of})

        def find_or_add(session: Session) -> tuple[JobRow, bool]:
            owner = tenants.locked(session, wish.tenant)
            known = _keyed_job(session, wish, key_digest)
            if known is None:
                self._hold_inputs(session, wish.tenant, wish.request)
                known = repository.lock_answering(session, wish.tenant, digest)
            row = known or JobRow(
                id=uuid.uuid4().hex,
                tenant=wish.tenant,
                kind=wish.request.kind.value,
                request=content,
                inputs=_inputs_of(wish.request),
                request_digest=digest,
                retry_of=wish.retry_of,
                request_id=current_request_id(),
                trace_parent=tracing.current_parent(),
            )
            if known is None:
                quotas.require_job(session, owner)
                repository.add(session, row, _uploads_of(wish.request))
            elif JobState(row.state) in FINISHED:
                row.expires_at = self._retention.expiry()  # whoever asks for it again may fetch it again
            if wish.key is not None and repository.find_key(session, wish.tenant, wish.key) is None:
                repository.add_key(session, wish.key, row, key_digest)
            if wish.webhook is not None:
                self._webhooks.subscribe(session, row, wish.webhook)
            if wish.retry_of is not None:
                self._webhooks.subscribe_as(session, row, wish.retry_of)
            return row, known is None

        row, is_new = self._database.write(find_or_add)
        log.info("job submitted", job=row.id, kind=row.kind, new=is_new)
        how = "known" if not is_new else "new" if wish.retry_of is None else "retry"
        JOBS_SUBMITTED.labels(row.kind, how).inc()
        self.queued.set()
        return job_of(row)

    def get(self, tenant: str, job_id: str) -> Job:
        """Raises: ServiceError: `job_not_found`."""
        with self._database.reading() as session:
            return job_of(_found(repository.find(session, tenant, job_id)))

    def page(self, tenant: str, *, state: JobState | None, cursor: int | None, limit: int) -> JobPage:
        """A tenant's jobs, the newest first."""
        with self._database.reading() as session:
            rows = repository.page(session, tenant, state=state, cursor=cursor, limit=limit + 1)
        more = len(rows) > limit
        rows = rows[:limit]
        return JobPage(items=[_summary_of(row) for row in rows], next=rows[-1].number if more else None)

    def summary(self, tenant: str, job_id: str) -> JobSummary:
        """Raises: ServiceError: `job_not_found`."""
        with self._database.reading() as session:
            return _summary_of(_found(repository.find_summary(session, tenant, job_id)))

    def changes(self, known: Mapping[str, int]) -> dict[str, JobSummary | None]:
        """Of jobs, given with the revisions that are known, those that have others; None: it is gone."""
        changes: dict[str, JobSummary | None] = {}
        job_ids = list(known)
        with self._database.reading() as session:
            # A database takes only so many parameters at a time.
            for some in (job_ids[first : first + 1000] for first in range(0, len(job_ids), 1000)):
                revisions = repository.revisions(session, some)
                changes |= {job_id: None for job_id in some if job_id not in revisions}
                changed = [job_id for job_id, revision in revisions.items() if revision != known[job_id]]
                if changed:
                    summaries = map(_summary_of, repository.summaries(session, changed))
                    changes |= {summary.id: summary for summary in summaries}
        return changes

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a job; its process is killed by the worker that runs it.

        Raises:
            ServiceError: `job_not_found`, `job_finished`.
        """
        with self._database.writing() as session:
            row = _found(repository.lock(session, tenant, job_id))
            if JobState(row.state) in FINISHED:
                raise ServiceError(ServiceErrorCode.JOB_FINISHED, f"The job has already {_PAST[row.state]}.")
            repository.change(
                session,
                job_id,
                UNFINISHED,
                state=JobState.CANCELLED.value,
                finished_at=now(),
                expires_at=self._retention.expiry(),
            )
            session.refresh(row)
            job = job_of(row)
        log.info("job cancelled", job=job_id)
        job_finished(job.kind, JobState.CANCELLED, None, None)
        return job

    def result_file(self, tenant: str, job_id: str, name: str) -> tuple[str, StoredFile]:
        """One file of a succeeded job's result, with its key in the store.

        Raises:
            ServiceError: `job_not_found`, `job_not_succeeded`, `file_not_found`.
        """
        files = self.result_files(tenant, job_id)
        for key, file in files:
            if file.name == name:
                return key, file
        raise ServiceError(
            ServiceErrorCode.FILE_NOT_FOUND,
            f"The job made no such file; it made {', '.join(file.name for _, file in files)}.",
            file=name,
        )

    def result_files(self, tenant: str, job_id: str) -> list[tuple[str, StoredFile]]:
        """All files of a succeeded job's result, but for the zip, each with its key in the store.

        Raises:
            ServiceError: `job_not_found`, `job_not_succeeded`.
        """
        job = self._succeeded(tenant, job_id)
        return [(result_key(job.id, job.attempt, f"files/{file.name}"), file) for file in job.files]

    def bundle(self, tenant: str, job_id: str) -> tuple[str, StoredFile]:
        """The zip of a prepare job's bundle, with its key; errors as for `result_file`."""
        job = self._succeeded(tenant, job_id)
        if job.bundle is None:
            raise ServiceError(
                ServiceErrorCode.FILE_NOT_FOUND,
                f"A {job.kind} job makes no bundle; get its files one by one.",
            )
        return result_key(job.id, job.attempt, job.bundle.name), job.bundle

    def _succeeded(self, tenant: str, job_id: str) -> Job:
        job = self.get(tenant, job_id)
        _require_success(job.state)
        return job

    def _hold_inputs(self, session: Session, tenant: str, request: PrepareRequest | FinalizeRequest) -> None:
        """See to it that the inputs are there, and are not removed before the job is in the database."""
        if isinstance(request, FinalizeRequest):
            _require_prepared(repository.find(session, tenant, request.prepare_job))
        for kind, identifier in _uploads_of(request):
            self._uploads.hold(session, tenant, kind, identifier)
        if isinstance(request, FinalizeRequest):
            # Jobs are locked after uploads, here and in `_queue`: no two transactions wait for each other.
            _require_prepared(repository.lock(session, tenant, request.prepare_job))


def _inputs_of(request: PrepareRequest | FinalizeRequest) -> dict[str, str]:
    """The ids of what a job works on, by the names of their fields."""
    return request.model_dump(include=_INPUT_FIELDS, exclude_none=True)


def _uploads_of(request: PrepareRequest | FinalizeRequest) -> list[tuple[UploadKind, str]]:
    """The uploads that a job reads."""
    inputs = (
        {UploadKind.MODEL: request.model, UploadKind.DATASET: request.calibration}
        if isinstance(request, PrepareRequest)
        else {UploadKind.CHECKPOINT: request.checkpoint, UploadKind.DATASET: request.verify}
    )
    return [(kind, identifier) for kind, identifier in inputs.items() if identifier is not None]


def _require_prepared(row: JobRow | None) -> None:
    prepared = _found(row)
    _require_success(prepared.state)
    if prepared.kind != JobKind.PREPARE:
        raise ServiceError(
            ServiceErrorCode.REQUEST_INVALID,
            "The job to finalize is not a prepare job.",
            field="prepare_job",
        )


def _require_success(state: str) -> None:
    if state != JobState.SUCCEEDED:
        raise ServiceError(
            ServiceErrorCode.JOB_NOT_SUCCEEDED, f"The job is {state}; only a succeeded job has files."
        )


_PAST: Final = {state.value: state.value for state in FINISHED} | {"cancelled": "been cancelled"}


def _keyed_job(session: Session, wish: _Wish, digest: str) -> JobRow | None:
    key = None if wish.key is None else repository.find_key(session, wish.tenant, wish.key)
    if key is None:
        return None
    if key.request_digest != digest:
        raise ServiceError(
            ServiceErrorCode.IDEMPOTENCY_KEY_REUSED,
            "The Idempotency-Key was used for another request; take a new key for each request.",
            field="Idempotency-Key",
        )
    return repository.lock_by_number(session, key.job_number)


def _content(request: PrepareRequest | FinalizeRequest) -> dict[str, Any]:
    """What makes one piece of work another than others, defaults included."""
    return request.model_dump(mode="json", exclude={"webhook"})


def _sent(request: PrepareRequest | FinalizeRequest) -> dict[str, Any]:
    """Of a request what its client chose: the same in every version, whose defaults may differ."""
    sent = request.model_dump(mode="json", exclude={"webhook"}, exclude_unset=True, exclude_none=True)
    return {name: value for name, value in sent.items() if value != {}}  # as an empty recipe


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _found(row: T | None) -> T:
    if row is None:
        raise ServiceError(ServiceErrorCode.JOB_NOT_FOUND, "There is no job with this id.")
    return row


def request_of(row: JobRow) -> PrepareRequest | FinalizeRequest:
    """What a job is to do.

    Raises:
        QatError: `recipe_invalid`, `recipe_unsupported`: another version of the service took the recipe.
    """
    return _REQUEST.validate_python(row.request)


def job_of(row: JobRow) -> Job:
    """A job as it crosses the wire, whichever version took it."""
    try:
        request = request_of(row)
    except QatError:
        request = _REQUEST.validate_python({**row.request, "recipe": Recipe()})
        request = request.model_copy(update={"recipe": row.request["recipe"]})
    return Job(request=request, **_fields_of(row))


def _summary_of(row: JobRow) -> JobSummary:
    return JobSummary(request=_INPUTS.validate_python({"kind": row.kind, **row.inputs}), **_fields_of(row))


def _fields_of(row: JobRow) -> dict[str, Any]:
    """All but the request."""
    return {
        "id": row.id,
        "kind": JobKind(row.kind),
        "state": JobState(row.state),
        "progress": Progress(stage=row.stage, fraction=row.fraction),
        "failure": None if row.failure is None else Cause.model_validate(row.failure),
        "files": [StoredFile.model_validate(file) for file in row.files],
        "bundle": None if row.bundle is None else StoredFile.model_validate(row.bundle),
        "attempt": row.attempt,
        "revision": row.revision,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "retry_of": row.retry_of,
        "expires_at": row.expires_at,
    }
