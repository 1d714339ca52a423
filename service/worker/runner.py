"""One job from its inputs to its published result; the same for all kinds of workers."""

from __future__ import annotations

import hashlib
import re
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from service import tracing
from service.errors import Cause, ServiceError, ServiceErrorCode
from service.jobs.leases import Claim, Leases
from service.jobs.schemas import PrepareRequest, Progress
from service.jobs.service import JobService
from service.settings import Settings
from service.storage import room
from service.storage.directory import DataDirectory
from service.storage.store import Store, result_key
from service.unavailable import UNAVAILABLE
from service.uploads.kinds import FILE_NAMES, UploadKind
from service.uploads.schemas import StoredFile
from service.uploads.service import UploadService
from service.worker.heart import Heart
from service.worker.isolation import Isolation, examine
from service.worker.limits import Limits
from service.worker.order import BUNDLE_FILE, RESULT_DIRECTORY, FinalizeWork, PrepareWork
from service.worker.process import JobProcess
from service.worker.silence import sign_interval
from service.worker.stages import Stages

log = structlog.get_logger()

# Names of result files: nothing that any store could take for something else.
_PLAIN_NAME: Final = re.compile(r"[\w.+-]{1,200}", re.ASCII)
_TICK_SECONDS: Final = 0.2
_RETRY_SECONDS: Final = 2.0


class _StoppedError(Exception):
    """This process is to end."""


class _LostError(Exception):
    """The job was cancelled, or has another worker by now."""


class _Result(NamedTuple):
    files: list[StoredFile]
    bundle: StoredFile | None


class Runner:
    """Runs claimed jobs, each in a process of its own. Safe to use from several threads."""

    def __init__(
        self,
        settings: Settings,
        data: DataDirectory,
        store: Store,
        uploads: UploadService,
        jobs: JobService,
        leases: Leases,
    ) -> None:
        self.stopping = threading.Event()
        """Set it to have all jobs put back into the queue."""
        self.draining = threading.Event()
        """Set it to have no more jobs taken, while those that run may finish."""
        self._settings = settings
        self._data = data
        self._store = store
        self._uploads = uploads
        self._jobs = jobs
        self._leases = leases
        self._limits = Limits(
            cpu_seconds=settings.job_cpu_seconds,
            memory_bytes=settings.job_memory_bytes,
            file_bytes=settings.job_file_bytes,
            open_files=settings.job_open_files,
            scratch_bytes=settings.job_scratch_bytes,
            scratch_files=settings.job_scratch_files,
            threads=settings.job_threads,
        )
        self.isolation: Isolation | None = None
        """How jobs are isolated on this machine; None where nothing runs jobs."""

    def examine_isolation(self) -> None:
        """Find out how jobs are isolated on this machine. Before the first job.

        Raises:
            IsolationUnavailableError: the settings demand more than this machine can.
        """
        if self.isolation is None:
            self.isolation = examine(required=self._settings.job_isolation == "required")

    def run(self, claim: Claim) -> None:
        """Do a job; whatever happens here, it does not stay `running`."""
        job = claim.job
        names: dict[str, str | int] = {
            "job": job.id,
            "attempt": job.attempt,
            "request": claim.request_id or "unknown",
        }
        attributes = {f"onnx_qat.{name}": value for name, value in names.items()}
        with (
            structlog.contextvars.bound_contextvars(**names),
            tracing.job_span(job.kind, claim.trace_parent, attributes),
        ):
            log.info("job started", kind=job.kind)
            try:
                self._run(claim)
            except _StoppedError:
                self._give_back(claim)
            except _LostError:
                log.info("the job was cancelled or has another worker now")
                self._delete_results(claim, [job.attempt])
            except UNAVAILABLE as error:
                log.warning("a server does not answer; the job will run again", error=str(error))
                self._give_back(claim)
                self.stopping.wait(_RETRY_SECONDS)
            except Exception as error:
                cause = _cause_of(error)
                if cause.code is ServiceErrorCode.INTERNAL_ERROR:
                    log.exception("job failed in its worker")
                self._delete_results(claim, [job.attempt])  # a part of them may be there
                self._fail(claim, cause)

    def _run(self, claim: Claim) -> None:
        seconds = sign_interval(self._settings.lease_seconds)
        with Heart(self._leases, claim, seconds) as heart, Stages(claim.job.kind) as stages:
            with self._data.workplace(claim.job.id) as (inputs, scratch):
                failure = self._work(claim, heart, stages, inputs, scratch)
                if failure is None:
                    stages.enter("publish")
                    result = self._publish(claim, scratch / RESULT_DIRECTORY)
                else:
                    result = None
            # Nothing is left of the work, nor of lost workers', when it is said to have ended.
            self._delete_results(claim, range(1, claim.job.attempt))
            if result is None:
                assert failure is not None
                self._fail(claim, failure)
            else:
                self._succeed(claim, result)

    def _work(self, claim: Claim, heart: Heart, stages: Stages, inputs: Path, scratch: Path) -> Cause | None:
        """Have the work done in a process; why it failed, if it did."""
        stages.enter("fetch")
        job, work = claim.job.id, self._work_of(claim, inputs)
        stages.enter("start")
        with JobProcess(job, work, self._limits, scratch, self._data.root, stages.enter) as process:
            log.info("process started", pid=process.pid)
            reported = None
            while not process.wait(_TICK_SECONDS):
                if self.stopping.is_set():
                    raise _StoppedError
                if heart.lost.is_set():
                    raise _LostError
                if process.elapsed_seconds > self._settings.job_timeout_seconds:
                    return _TIMED_OUT
                if (excess := process.excess()) is not None:
                    return excess
                if not room.is_left(scratch, self._settings.reserved_bytes):
                    return _STORAGE_FULL
                if process.progress is not None and process.progress != reported:
                    reported = process.progress
                    self._advance(claim, Progress(stage=reported.stage, fraction=reported.fraction))
            log.info(
                "process ended",
                cpu_seconds=round(process.cpu_seconds, 2),
                peak_memory_bytes=process.peak_memory_bytes,
            )
            failure = process.failure() or process.excess()
            if failure is not None:
                log.warning("process failed", code=failure.code, output=process.output_tail())
            return failure

    def _publish(self, claim: Claim, directory: Path) -> _Result:
        """Put the result in place; nobody sees it before the job has succeeded."""
        job = claim.job
        _check_plain(directory)
        paths = sorted((directory / "files").iterdir())
        if isinstance(job.request, PrepareRequest):
            paths.append(directory / BUNDLE_FILE)
        stored = {path: _stored(path) for path in paths}
        for path in paths:
            self._store.put(result_key(job.id, job.attempt, str(path.relative_to(directory))), path)
        bundle = stored.pop(directory / BUNDLE_FILE, None)
        return _Result(list(stored.values()), bundle)

    def _succeed(self, claim: Claim, result: _Result) -> None:
        """End the job. All the work is done: wait for a database that does not answer."""
        while True:
            try:
                succeeded = self._leases.succeed(claim, result.files, result.bundle)
                break
            except UNAVAILABLE as error:
                log.warning("cannot end the job, trying again", error=str(error))
                if self.stopping.wait(_RETRY_SECONDS):
                    raise
        if not succeeded:
            raise _LostError
        log.info("job succeeded")

    def _delete_results(self, claim: Claim, attempts: Iterable[int]) -> None:
        for attempt in attempts:
            try:
                self._store.delete_all(result_key(claim.job.id, attempt))
            except UNAVAILABLE as error:
                log.warning("cannot remove a result that is not served", error=str(error))

    def _fail(self, claim: Claim, failure: Cause) -> None:
        # Should the database not answer, the job runs again when its lease is over.
        if self._leases.fail(claim, failure):
            tracing.failed(failure.code)
            log.info("job failed", code=failure.code, detail=failure.detail)

    def _give_back(self, claim: Claim) -> None:
        try:
            self._leases.give_back(claim)
            log.info("job queued again")
        except UNAVAILABLE as error:
            log.warning("the job will be queued again when its lease is over", error=str(error))

    def _advance(self, claim: Claim, progress: Progress) -> None:
        try:
            self._leases.advance(claim, progress)
        except UNAVAILABLE as error:
            log.warning("cannot report progress, going on", error=str(error))

    def _work_of(self, claim: Claim, inputs: Path) -> PrepareWork | FinalizeWork:
        """What the job's process is to do, with its input files in place."""
        tenant, request = claim.tenant, claim.job.request
        if isinstance(request, PrepareRequest):
            model = self._fetch(tenant, UploadKind.MODEL, request.model, inputs)
            assert model is not None
            return PrepareWork(
                model=model,
                recipe=request.recipe,
                calibration=self._fetch(tenant, UploadKind.DATASET, request.calibration, inputs),
            )
        return FinalizeWork(
            bundle=self._fetch_bundle(tenant, request.prepare_job, inputs / "bundle"),
            checkpoint=self._fetch(tenant, UploadKind.CHECKPOINT, request.checkpoint, inputs),
            verify=self._fetch(tenant, UploadKind.DATASET, request.verify, inputs),
        )

    def _fetch(self, tenant: str, kind: UploadKind, identifier: str | None, inputs: Path) -> Path | None:
        if identifier is None:
            return None
        self._uploads.fetch(tenant, kind, identifier, inputs / kind.value)
        return inputs / kind.value / FILE_NAMES[kind]

    def _fetch_bundle(self, tenant: str, prepare_job: str, directory: Path) -> Path:
        directory.mkdir()
        for key, file in self._jobs.result_files(tenant, prepare_job):
            self._store.fetch(key, directory / file.name, file.sha256)
        return directory


_STORAGE_FULL: Final = Cause(code=ServiceErrorCode.STORAGE_FULL, detail="The service is out of disk space.")
_TIMED_OUT: Final = Cause(
    code=ServiceErrorCode.WORKER_TIMEOUT,
    detail="The job took longer than the service allows. Use fewer calibration samples.",
)


def _cause_of(error: Exception) -> Cause:
    if isinstance(error, ServiceError):  # an input was removed meanwhile
        return error.cause
    if room.is_full(error):
        return _STORAGE_FULL
    return Cause(code=ServiceErrorCode.INTERNAL_ERROR, detail="The service failed; its log says why.")


def _check_plain(result: Path) -> None:
    """Only directories and plain files are taken: a link could show a file that is not the job's."""
    for path in (result, *result.rglob("*")):
        status = path.lstat()
        plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        if not plain and not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"The job's process left something that is not a plain file: {path.name}")


def _stored(path: Path) -> StoredFile:
    if not _PLAIN_NAME.fullmatch(path.name):
        raise ValueError(f"The job's process left a file with a name that is not plain: {path.name!r}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(name=path.name, bytes=path.stat().st_size, sha256=digest)
