"""The embedded workers: threads that take queued jobs and have each done by a process of its own."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import Final

import structlog

from service.errors import Cause, ServiceErrorCode
from service.jobs.schemas import Job, PrepareRequest, Progress
from service.jobs.service import JobService
from service.settings import Settings
from service.storage import DataDirectory, publish
from service.uploads.models import UploadKind
from service.uploads.receiving import FILE_NAMES
from service.uploads.schemas import StoredFile
from service.uploads.service import UploadService
from service.worker.limits import landlock_version
from service.worker.order import BUNDLE_FILE, RESULT_DIRECTORY, FinalizeWork, Limits, PrepareWork
from service.worker.process import JobProcess

log = structlog.get_logger()

_IDLE_SECONDS: Final = 0.5
_TICK_SECONDS: Final = 0.2
_RETRY_SECONDS: Final = 2.0


class Supervisor:
    """Runs queued jobs until it is stopped."""

    def __init__(
        self, settings: Settings, data: DataDirectory, uploads: UploadService, jobs: JobService
    ) -> None:
        self._settings = settings
        self._data = data
        self._uploads = uploads
        self._jobs = jobs
        self._limits = Limits(
            cpu_seconds=settings.job_cpu_seconds,
            memory_bytes=settings.job_memory_bytes,
            file_bytes=settings.job_file_bytes,
        )
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}") for number in range(settings.workers)
        ]

    def start(self) -> None:
        """Queue again what a dead service left running, and begin."""
        if landlock_version() < 1:
            log.warning("this kernel has no Landlock: jobs are not kept from writing outside their directory")
        self._jobs.recover()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the running processes; their jobs go back into the queue."""
        self._stopping.set()
        self._jobs.queued.set()
        for thread in self._threads:
            thread.join()

    def is_alive(self) -> bool:
        """Whether all workers are running."""
        return all(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._jobs.claim()
                if job is None:
                    self._jobs.queued.wait(_IDLE_SECONDS)
                    self._jobs.queued.clear()
                else:
                    with structlog.contextvars.bound_contextvars(job=job.id):
                        self._run(job)
            except Exception:
                # The database or the disk does not answer; a worker outlives that.
                log.exception("worker failed, going on")
                self._stopping.wait(_RETRY_SECONDS)

    def _run(self, job: Job) -> None:
        """Do a job; whatever happens here, it does not stay `running`."""
        log.info("job started", kind=job.kind)
        scratch = Path(tempfile.mkdtemp(prefix=f"{job.id}-", dir=self._data.scratch))
        try:
            self._attempt(job, scratch)
        except Exception:
            log.exception("job failed in the supervisor")
            self._fail(
                job,
                Cause(code=ServiceErrorCode.INTERNAL_ERROR, detail="The service failed; its log says why."),
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _attempt(self, job: Job, scratch: Path) -> None:
        with JobProcess(job.id, self._work_of(job), self._limits, scratch) as process:
            log.info("process started", pid=process.pid)
            reported = None
            while not process.wait(_TICK_SECONDS):
                if self._stopping.is_set():
                    self._jobs.requeue(job.id)
                    log.info("job queued again: the service stops")
                    return
                if not self._jobs.is_running(job.id):
                    return  # cancelled
                if process.elapsed_seconds > self._settings.job_timeout_seconds:
                    self._fail(job, _TIMED_OUT)
                    return
                if process.progress is not None and process.progress != reported:
                    reported = process.progress
                    self._jobs.advance(job.id, Progress(stage=reported.stage, fraction=reported.fraction))
            failure = process.failure()
            if failure is not None:
                log.warning("process failed", code=failure.code, output=process.output_tail())
                self._fail(job, failure)
                return
        self._publish(job, scratch / RESULT_DIRECTORY)

    def _publish(self, job: Job, result: Path) -> None:
        """Put the result in place, then say that the job succeeded."""
        files = [_stored(path) for path in sorted((result / "files").iterdir())]
        bundle = _stored(result / BUNDLE_FILE) if isinstance(job.request, PrepareRequest) else None
        target = self._jobs.result_directory(job.id)
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that a dead service could not finish
        publish(result, target)
        if self._jobs.succeed(job.id, files, bundle):
            log.info("job succeeded")
        else:
            shutil.rmtree(target, ignore_errors=True)

    def _fail(self, job: Job, failure: Cause) -> None:
        if self._jobs.fail(job.id, failure):
            log.info("job failed", code=failure.code, detail=failure.detail)

    def _work_of(self, job: Job) -> PrepareWork | FinalizeWork:
        request = job.request
        if isinstance(request, PrepareRequest):
            model = self._file(UploadKind.MODEL, request.model)
            assert model is not None
            return PrepareWork(
                model=model,
                recipe=request.recipe,
                calibration=self._file(UploadKind.DATASET, request.calibration),
            )
        return FinalizeWork(
            bundle=self._jobs.result_directory(request.prepare_job) / "files",
            checkpoint=self._file(UploadKind.CHECKPOINT, request.checkpoint),
            verify=self._file(UploadKind.DATASET, request.verify),
        )

    def _file(self, kind: UploadKind, identifier: str | None) -> Path | None:
        return None if identifier is None else self._uploads.path(kind, identifier) / FILE_NAMES[kind]


_TIMED_OUT: Final = Cause(
    code=ServiceErrorCode.WORKER_TIMEOUT, detail="The job took longer than the service allows."
)


def _stored(path: Path) -> StoredFile:
    """Digest of a result file. Only a plain file is taken: a link could show a file that is not the job's."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise ValueError(f"The job's process left something that is not a plain file: {path.name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(name=path.name, bytes=status.st_size, sha256=digest)
