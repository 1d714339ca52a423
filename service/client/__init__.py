"""A typed client of the HTTP service.

with Client("http://127.0.0.1:8000") as client:
    job = client.prepare(Path("model.onnx"), calibration=Path("samples.npz"))
    client.wait(job.id)
    client.download_bundle(job.id, Path("bundle"))

It needs neither the service's web framework nor its database, nor onnxruntime.
"""

from __future__ import annotations

from service.client.client import Client
from service.client.errors import ApiError, ClientError, DownloadError, JobFailed, UnreachableError
from service.client.models import Failure, Job, JobPage, JobSummary
from service.jobs.states import JobKind, JobState
from service.tenants.schemas import TenantStatus
from service.uploads.schemas import StoredFile, Upload
from service.webhooks.schemas import Delivery, Webhook, WebhookEvent

__all__ = [
    "ApiError",
    "Client",
    "ClientError",
    "Delivery",
    "DownloadError",
    "Failure",
    "Job",
    "JobFailed",
    "JobKind",
    "JobPage",
    "JobState",
    "JobSummary",
    "StoredFile",
    "TenantStatus",
    "UnreachableError",
    "Upload",
    "Webhook",
    "WebhookEvent",
]
