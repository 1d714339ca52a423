"""The client: one method for each thing that the service does.

But for resumable uploads, for which there are clients of tus, and the making of webhook secrets.
"""

from __future__ import annotations

import functools
import os
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import ValidationError

from rewriter import Progress, Recipe
from service.client import downloads, uploads
from service.client.connection import Connection, is_passing
from service.client.errors import ApiError, ClientError, DownloadError, JobFailed, UnreachableError
from service.client.models import Job, JobPage, JobSummary
from service.jobs.states import FINISHED, JobKind, JobState
from service.tenants.schemas import TenantStatus
from service.uploads.kinds import UploadKind
from service.uploads.schemas import StoredFile, Upload, content_id
from service.webhooks.schemas import Delivery, DeliveryList, Webhook

API_KEY_VARIABLE: Final = "ONNX_QAT_API_KEY"

# The service may take a while to put a large upload in its place before it answers.
_UPLOAD_ANSWER_SECONDS: Final = 600.0
# The service breaks a job's silence more often than this; a connection that is silent for longer is dead.
_SILENCE_SECONDS: Final = 45.0
_COMMENT_SECONDS: Final = 16.0  # a little more than it takes for that
# After so many streams in a row that told nothing (a proxy holds them back), jobs are asked for instead.
_SILENT_STREAMS: Final = 3
_POLL_SECONDS: Final = 1.0


def _silent(stage: str, fraction: float) -> None:
    """The progress of a caller who does not ask for any."""


class Client:
    """A connection to the service; use it as a context manager or close it. Not for several threads at once.

    Every call is repeated while the service cannot be reached or answers 429, 502, 503 or 504 (after the time
    that Retry-After names), which does nothing twice: uploads are named by their content and submissions
    carry an Idempotency-Key. All methods raise `ApiError` for what the service refuses and `UnreachableError`
    when it does not answer, or something else does at its address.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            base_url: where the service is, "http://127.0.0.1:8000".
            api_key: sent as `Authorization: Bearer`; default: the environment's ONNX_QAT_API_KEY.
            timeout: seconds to connect, and for which the service may be silent.
            retries: how often a call is repeated; the pauses between begin at half a second and double.
            transport: carries the requests in place of the network.

        Raises:
            UnreachableError: `base_url` is no address.
        """
        self._timeout = timeout
        self._connection = Connection(
            base_url,
            api_key=api_key or os.environ.get(API_KEY_VARIABLE),
            timeout=timeout,
            retries=retries,
            transport=transport,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # Uploads.

    def upload_model(
        self, model: Path, *, external_data: Sequence[Path] | None = None, progress: Progress = _silent
    ) -> Upload:
        """Store a model, unless the service has it already.

        Args:
            external_data: the files that hold its tensors; default: those that the model refers to.
            progress: called with the stage and the share of it that is done.

        Raises:
            QatError: `model_not_found`, `external_data_missing`, `external_data_outside`.
        """
        return self._upload(UploadKind.MODEL, model, external_data, progress)

    def upload_dataset(self, dataset: Path, *, progress: Progress = _silent) -> Upload:
        """Store samples, an npz file, unless the service has them; QatError: `data_not_found`."""
        return self._upload(UploadKind.DATASET, dataset, None, progress)

    def upload_checkpoint(self, checkpoint: Path, *, progress: Progress = _silent) -> Upload:
        """Store a trained checkpoint, unless the service has it; QatError: `checkpoint_invalid`."""
        return self._upload(UploadKind.CHECKPOINT, checkpoint, None, progress)

    def delete_model(self, upload_id: str) -> None:
        """Remove a model; ApiError: `upload_in_use`, `model_not_found`."""
        self._connection.delete(_upload_path(UploadKind.MODEL, upload_id))

    def delete_dataset(self, upload_id: str) -> None:
        """Remove samples; ApiError: `upload_in_use`, `data_not_found`."""
        self._connection.delete(_upload_path(UploadKind.DATASET, upload_id))

    def delete_checkpoint(self, upload_id: str) -> None:
        """Remove a checkpoint; ApiError: `upload_in_use`, `checkpoint_not_found`."""
        self._connection.delete(_upload_path(UploadKind.CHECKPOINT, upload_id))

    # Jobs.

    def prepare(
        self,
        model: Path | Upload,
        *,
        recipe: Recipe | Mapping[str, Any] | None = None,
        calibration: Path | Upload | None = None,
        external_data: Sequence[Path] | None = None,
        webhook: Webhook | None = None,
        idempotency_key: str | None = None,
        progress: Progress = _silent,
    ) -> Job:
        """Upload what is given as paths, and queue the making of a bundle.

        Args:
            recipe: a `Recipe` or its JSON; default: the service's own.
            calibration: samples to calibrate with.
            external_data, progress: as for `upload_model`.
            webhook: whom the service tells of the job.
            idempotency_key: a key of your own, so that a submission that you repeat is still one; by default
                each call has a new one.

        Raises:
            QatError: as for the uploads.
        """
        if isinstance(model, Path):
            model = self.upload_model(model, external_data=external_data, progress=progress)
        if isinstance(calibration, Path):
            calibration = self.upload_dataset(calibration, progress=progress)
        request: dict[str, Any] = {"kind": JobKind.PREPARE, "model": model.id}
        if recipe is not None:
            request["recipe"] = _json(recipe)
        if calibration is not None:
            request["calibration"] = calibration.id
        return self._submit(request, webhook, idempotency_key)

    def finalize(
        self,
        prepare_job: str,
        *,
        checkpoint: Path | Upload | None = None,
        verify: Path | Upload | None = None,
        webhook: Webhook | None = None,
        idempotency_key: str | None = None,
        progress: Progress = _silent,
    ) -> Job:
        """Upload what is given as paths, and queue the making of the int8 model.

        Args:
            prepare_job: id of the job that made the bundle.
            checkpoint: the trained one; default: the bundle's own, which is not trained.
            verify: samples on which the int8 model is compared with the trained one.
            webhook, idempotency_key, progress: as for `prepare`.

        Raises:
            QatError: as for the uploads.
        """
        if isinstance(checkpoint, Path):
            checkpoint = self.upload_checkpoint(checkpoint, progress=progress)
        if isinstance(verify, Path):
            verify = self.upload_dataset(verify, progress=progress)
        request: dict[str, Any] = {"kind": JobKind.FINALIZE, "prepare_job": prepare_job}
        if checkpoint is not None:
            request["checkpoint"] = checkpoint.id
        if verify is not None:
            request["verify"] = verify.id
        return self._submit(request, webhook, idempotency_key)

    def job(self, job_id: str) -> Job:
        """State, progress and outcome of a job."""
        return self._connection.send("GET", _job_path(job_id), Job)

    def jobs(self, *, state: JobState | None = None) -> Iterator[JobSummary]:
        """All jobs, or those in a state, the newest first; `job` has the recipe of one too."""
        parameters: dict[str, Any] = {} if state is None else {"state": state.value}
        while True:
            page = self._connection.send("GET", "/v1/jobs", JobPage, params=parameters)
            yield from page.items
            if page.next is None:
                return
            parameters["cursor"] = page.next

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that has not finished; one that was cancelled before is returned as it is."""
        try:
            return self._connection.send("POST", f"{_job_path(job_id)}/cancel", Job)
        except ApiError as error:
            if error.code == "job_finished" and (job := self.job(job_id)).state is JobState.CANCELLED:
                return job
            raise

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Queue the work of a failed or cancelled job again, as a new job; ApiError: `job_not_retryable`."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._connection.send("POST", f"{_job_path(job_id)}/retry", Job, headers=headers)

    def delete_job(self, job_id: str) -> None:
        """Remove a finished job and its files; ApiError: `job_not_finished`, `job_in_use`."""
        self._connection.delete(_job_path(job_id))

    def watch(
        self, job_id: str, *, timeout: float | None = None, patience: float = 300.0
    ) -> Iterator[JobSummary]:
        """The job now and after each change, until it has ended.

        The changes come as server-sent events; where these do not come through, by asking every second.

        Args:
            timeout: seconds after which to give up.
            patience: seconds for which the service may be away, once it has answered.

        Raises:
            TimeoutError: the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        revision: int | None = None
        silent_streams = 0
        answered, away_since = False, None
        while True:
            told = 0
            try:
                for job in self._news(job_id, revision, deadline, silent_streams < _SILENT_STREAMS):
                    told += 1
                    answered, away_since = True, None
                    if job.revision != revision:
                        revision = job.revision
                        yield job
                    if job.state in FINISHED:
                        return
                    _require_time(deadline, job_id)
            except (ApiError, UnreachableError) as error:
                is_final = isinstance(error, ApiError) and not is_passing(error)
                away_since = away_since or time.monotonic()
                if is_final or not answered or time.monotonic() - away_since > patience:
                    raise
            _require_time(deadline, job_id)
            # The last of the news was asked for, what came before was the stream's.
            silent_streams = 0 if told > 1 else silent_streams + 1
            time.sleep(_POLL_SECONDS)

    def wait(self, job_id: str, *, timeout: float | None = None) -> Job:
        """The job once it has succeeded.

        Args:
            timeout: seconds after which to give up.

        Raises:
            JobFailed: it failed or was cancelled.
            TimeoutError: it goes on.
        """
        for job in self.watch(job_id, timeout=timeout):
            if job.state is JobState.SUCCEEDED:
                return self.job(job_id)
            if job.state in FINISHED:
                raise JobFailed(job)
        raise AssertionError("a watch ends with the job")

    # Results.

    def download_bundle(self, job_id: str, target: Path, *, progress: Progress = _silent) -> Path:
        """Get the bundle that a prepare job made: as a zip where `target` ends in .zip, else as a directory.

        Each file is compared with the SHA-256 that the service names. The target appears when all is there.
        An attempt that breaks off leaves hidden files beside it, from which the same call goes on.

        Raises:
            QatError: `output_exists`.
            DownloadError: a file is not what the service stores.
            OSError: it cannot be written.
        """
        if target.suffix != ".zip":
            return self.download_files(job_id, target, progress=progress)
        downloads.require_free(target)
        path = f"{_job_path(job_id)}/bundle"
        bundle = self.job(job_id).bundle
        if bundle is None:
            raise self._refusal(path)
        self._download(path, bundle, target, progress)
        return target

    def download_files(self, job_id: str, directory: Path, *, progress: Progress = _silent) -> Path:
        """Get all files that a job made, as a new directory; otherwise as `download_bundle`."""
        downloads.require_free(directory)
        job = self.job(job_id)
        if job.state is not JobState.SUCCEEDED:
            raise self._refusal(f"{_job_path(job_id)}/bundle")
        # Named by the job: what is there of another one stays out of this one's.
        place = directory.resolve()  # `.` has no name
        staging = place.with_name(f".{place.name}.{job.id}.part")
        staging.mkdir(parents=True, exist_ok=True)
        for file in job.files:
            downloads.require_plain(file.name)
            if not (staging / file.name).exists():
                self._download(_file_path(job_id, file.name), file, staging / file.name, progress)
        staging.replace(place)
        return directory

    def download_file(self, job_id: str, name: str, target: Path, *, progress: Progress = _silent) -> Path:
        """Get one file that a job made, in place of what is at `target`; otherwise as `download_bundle`."""
        for file in self.job(job_id).files:
            if file.name == name:
                self._download(_file_path(job_id, name), file, target, progress)
                return target
        raise self._refusal(_file_path(job_id, name))

    # Webhooks, and who the client is.

    def deliveries(self, job_id: str) -> list[Delivery]:
        """What was told to the job's webhooks, and how far that got; the oldest first."""
        return self._connection.send("GET", f"{_job_path(job_id)}/deliveries", DeliveryList).items

    def redeliver(self, job_id: str, delivery_id: str) -> Delivery:
        """Have an event sent again, under the same webhook-id."""
        path = f"{_job_path(job_id)}/deliveries/{urllib.parse.quote(delivery_id, safe='')}/redeliver"
        return self._connection.send("POST", path, Delivery)

    def tenant(self) -> TenantStatus:
        """Whose key this is, and how much of the tenant's quotas is used."""
        return self._connection.send("GET", "/v1/tenant", TenantStatus)

    # Behind them.

    def _upload(
        self, kind: UploadKind, path: Path, external_data: Sequence[Path] | None, progress: Progress
    ) -> Upload:
        files = uploads.collect(kind, path, external_data)
        known = self._known_upload(kind, content_id([uploads.digest(file) for file in files]))
        if known is not None:
            progress(f"upload {path.name}", 1.0)
            return known
        return self._send(kind, files, progress)

    def _known_upload(self, kind: UploadKind, upload_id: str) -> Upload | None:
        try:
            return self._connection.send("GET", _upload_path(kind, upload_id), Upload)
        except ApiError as error:
            if error.status == httpx.codes.NOT_FOUND:
                return None
            raise

    def _send(self, kind: UploadKind, files: Sequence[uploads.LocalFile], progress: Progress) -> Upload:
        """Send the files in one request, from their beginning whenever it is repeated.

        An upload that must go on where it broke off goes by tus (/v1/uploads/tus); this does not.
        """
        return self._connection.send(
            "POST",
            f"/v1/{kind.value}",
            Upload,
            body=functools.partial(uploads.opened, kind, files, progress),
            timeout=httpx.Timeout(self._timeout, read=max(self._timeout, _UPLOAD_ANSWER_SECONDS)),
        )

    def _submit(self, request: dict[str, Any], webhook: Webhook | None, key: str | None) -> Job:
        if webhook is not None:
            request["webhook"] = webhook.model_dump(mode="json", exclude_unset=True)
            if webhook.secret is not None:
                request["webhook"]["secret"] = webhook.secret.get_secret_value()  # dumped as asterisks
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._connection.send("POST", "/v1/jobs", Job, json=request, headers=headers)

    def _news(
        self, job_id: str, revision: int | None, deadline: float | None, stream: bool
    ) -> Iterator[JobSummary]:
        """What a stream of events tells until it ends or breaks off, and then the job as it is."""
        if stream and not _is_near(deadline):
            yield from self._events(job_id, revision, deadline)
        yield self.job(job_id)

    def _events(self, job_id: str, revision: int | None, deadline: float | None) -> Iterator[JobSummary]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if revision is not None:
            headers["Last-Event-ID"] = str(revision)
        timeout = httpx.Timeout(self._timeout, read=_SILENCE_SECONDS)
        try:
            with self._connection.stream(
                f"{_job_path(job_id)}/events", headers=headers, timeout=timeout
            ) as answer:
                # By lines: a comment is a moment to look at the clock. An event's data is one line.
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        yield JobSummary.model_validate_json(line.removeprefix("data:"))
                    if _is_near(deadline):
                        return
        except (ApiError, UnreachableError, httpx.RequestError, ValidationError):
            return  # what is wrong shows when the job is asked for

    def _refusal(self, path: str) -> ClientError:
        """Why the service has no such file to give, in its own words."""
        try:
            self._connection.persist(lambda: self._connection.probe(path))
        except ApiError as error:
            return error
        return DownloadError("The job has only just made the file: ask again.")

    def _download(self, path: str, file: StoredFile, target: Path, progress: Progress) -> None:
        stage = f"download {file.name}"
        downloads.download(
            self._connection,
            path,
            file,
            target,
            lambda count: progress(stage, min(count / max(file.bytes, 1), 1.0)),
        )


def _json(recipe: Recipe | Mapping[str, Any]) -> Mapping[str, Any]:
    # Only what was set: defaults are the service's affair.
    return recipe.model_dump(mode="json", exclude_unset=True) if isinstance(recipe, Recipe) else recipe


def _upload_path(kind: UploadKind, upload_id: str) -> str:
    return f"/v1/{kind.value}/{urllib.parse.quote(upload_id, safe='')}"


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{urllib.parse.quote(job_id, safe='')}"


def _file_path(job_id: str, name: str) -> str:
    return f"{_job_path(job_id)}/files/{urllib.parse.quote(name, safe='')}"


def _is_near(deadline: float | None) -> bool:
    """Whether a quiet stream could outlast the deadline: asking every second keeps it better."""
    return deadline is not None and deadline - time.monotonic() < _COMMENT_SECONDS


def _require_time(deadline: float | None, job_id: str) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeoutError(f"The job {job_id} has not ended in time; it goes on.")
