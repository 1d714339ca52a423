"""Metrics: what they count, that their number is bounded, and that they come without the database too."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from receivers import Receiver
from service_helpers import free_port, queue, submit, wait_for, wait_until
from sqlalchemy.exc import OperationalError

import rewriter
from examples.models import model_path
from service.database import Database
from service.jobs.states import JobKind
from service.metrics import state
from service.services import Services
from service.settings import Settings
from service.webhooks.signing import new_secret
from service.worker.stages import STAGES, Stages

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(client: Any) -> Values:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in prometheus(answer.text)
        for sample in family.samples
    }


def value(values: Values, name: str, **labels: str) -> float:
    """Of one series; 0 where there is none yet."""
    return values.get((name, tuple(sorted(labels.items()))), 0.0)


@pytest.fixture
def change(client: TestClient) -> Callable[..., float]:
    """By how much a series has risen since the test began: what is counted is counted for the process."""
    before = read(client)
    return lambda name, **labels: value(read(client), name, **labels) - value(before, name, **labels)


def test_failures_that_alerts_go_by_are_there_from_the_start(client: TestClient) -> None:
    """A series that begins with its first failure has not increased."""
    failed = {"kind": "prepare", "state": "failed"}
    codes = {dict(labels).get("code") for (name, labels) in read(client) if failed.items() <= set(labels)}
    assert {"worker_crashed", "worker_timeout", "worker_lost", "internal_error", "storage_full"} <= codes


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """Without workers."""
    services = Services.of(Settings(data_dir=tmp_path / "services"))
    with services.opened():
        yield services


def test_requests_are_counted_by_route_method_and_status(client: TestClient, change) -> None:
    for number in range(3):
        client.get(f"/v1/jobs/{number:032x}")
    client.get("/v1/jobs", params={"limit": 0})
    client.get("/page/none.js")
    requests = "onnx_qat_http_requests_total"
    assert change(requests, method="GET", route="/v1/jobs/{job_id}", status="404") == 3
    assert change(requests, method="GET", route="/v1/jobs", status="422") == 1
    assert change("onnx_qat_http_request_seconds_count", method="GET", route="/v1/jobs/{job_id}") == 3


def test_bytes_are_counted_both_ways(client: TestClient, change) -> None:
    answer = client.post("/v1/models", content=b"x" * 3000)
    assert change("onnx_qat_http_request_bytes_total", route="/v1/models") == 3000
    assert change("onnx_qat_http_response_bytes_total", route="/v1/models") == len(answer.content)
    assert change("onnx_qat_upload_bytes_count", kind="models") == 1
    assert change("onnx_qat_upload_bytes_sum", kind="models") == 3000


def test_no_client_and_no_model_can_make_series(client: TestClient) -> None:
    def provoke(name: str) -> None:
        client.get(f"/{name}")
        client.get(f"/v1/jobs/{name}")
        client.get(f"/v1/jobs/{name}/files/{name}")
        client.request(name, "/v1/jobs")
        with Stages(JobKind.PREPARE) as stages:
            stages.enter(name)

    provoke("first")
    known = read(client).keys()
    for number in range(20):
        provoke(f"other{number}")
    assert read(client).keys() == known


def test_a_job_is_counted_from_submission_to_end(client: TestClient, change) -> None:
    job = submit(client, {})
    wait_for(client, job)
    submit(client, {})
    kind = {"kind": "prepare"}
    assert change("onnx_qat_jobs_submitted_total", **kind, how="new") == 1
    assert change("onnx_qat_jobs_submitted_total", **kind, how="known") == 1
    assert change("onnx_qat_job_wait_seconds_count", **kind) == 1
    assert change("onnx_qat_jobs_finished_total", **kind, state="succeeded", code="") == 1
    assert change("onnx_qat_job_seconds_count", **kind, state="succeeded") == 1
    # The fake worker's own stage has a name that nobody knows.
    for stage in ("fetch", "start", "other", "publish"):
        assert change("onnx_qat_job_stage_seconds_count", **kind, stage=stage) == 1
    assert change("onnx_qat_job_stage_seconds_sum", **kind, stage="start") > 0


def test_failures_are_counted_by_their_code(client: TestClient, change) -> None:
    for script in ({"do": "segfault"}, {"do": "fail"}):
        wait_for(client, submit(client, script))
    for code in ("worker_crashed", "model_domain_unknown"):
        assert change("onnx_qat_jobs_finished_total", kind="prepare", state="failed", code=code) == 1
    assert change("onnx_qat_job_seconds_count", kind="prepare", state="failed") == 2


def test_what_is_cancelled_and_tried_again_is_counted(client: TestClient, change) -> None:
    job = submit(client, {"seconds": 600})
    client.post(f"/v1/jobs/{job}/cancel")
    again = client.post(f"/v1/jobs/{job}/retry").json()["id"]
    client.post(f"/v1/jobs/{again}/cancel")
    assert change("onnx_qat_jobs_finished_total", kind="prepare", state="cancelled", code="") == 2
    assert change("onnx_qat_jobs_submitted_total", kind="prepare", how="retry") == 1


def test_lost_workers_and_jobs_that_are_put_back_are_counted(services: Services, change) -> None:
    queue(services)
    claim = services.leases.claim()
    assert claim is not None
    services.leases.give_back(claim)
    for _ in range(3):
        services.leases.claim()
        services.leases.recover()
    assert change("onnx_qat_jobs_requeued_total", reason="returned") == 1
    assert change("onnx_qat_jobs_requeued_total", reason="worker_lost") == 2
    assert change("onnx_qat_workers_lost_total") == 3
    assert change("onnx_qat_jobs_finished_total", kind="prepare", state="failed", code="worker_lost") == 1


def test_attempts_at_webhooks_are_counted_by_their_outcome(start_client) -> None:
    client = start_client(webhook_allow_private=True, webhook_ports=None, webhook_retry_seconds=(0,))
    before = read(client)

    def risen(outcome: str) -> float:
        name = "onnx_qat_webhook_attempts_total"
        return value(read(client), name, outcome=outcome) - value(before, name, outcome=outcome)

    for status, last in ((204, "delivered"), (500, "given_up")):
        with Receiver(status, status) as receiver:
            hook = json.dumps({"url": receiver.url, "secret": new_secret()})
            submit(client, {"files": {"a": last}}, data={"webhook": hook})
            wait_until(lambda last=last: risen(last) == 1)
    assert risen("failed") == 1


def test_the_queue_is_read_when_somebody_looks(services: Services) -> None:
    for number in range(3):
        queue(services, number)
    services.leases.claim()
    found = state.read_queue(services.database)
    assert found.counts == {"queued": 2, "running": 1}
    assert 0 < found.oldest_seconds < 60
    assert found.busy_workers == 1


def test_queue_and_store_are_in_the_metrics(start_client) -> None:
    client = start_client(workers=0)
    submit(client, {})
    metrics = read(client)
    assert value(metrics, "onnx_qat_jobs", state="queued") == 1
    assert value(metrics, "onnx_qat_jobs", state="running") == 0
    assert value(metrics, "onnx_qat_oldest_queued_job_seconds") > 0
    assert value(metrics, "onnx_qat_stored_bytes", content="uploads") == len("{}")
    assert value(metrics, "onnx_qat_data_directory_free_bytes") > 0
    assert value(metrics, "onnx_qat_database_up") == 1
    assert value(metrics, "process_resident_memory_bytes") > 0
    assert any(name == "onnx_qat_build_info" and dict(labels)["version"] for name, labels in metrics)


def test_metrics_come_without_the_database(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Database) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(Database, "reading", fail)
    metrics = read(client)
    assert value(metrics, "onnx_qat_database_up") == 0
    assert not [name for name, _ in metrics if name == "onnx_qat_jobs"]
    assert ("process_resident_memory_bytes", ()) in metrics


def test_metrics_come_while_the_database_hangs(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(Database, "reading", lambda self: answers.wait())
    monkeypatch.setattr(state, "_TIMEOUT_SECONDS", 0.2)
    started = time.monotonic()
    try:
        assert value(read(client), "onnx_qat_database_up") == 0
    finally:
        answers.set()
    assert time.monotonic() - started < 30


def test_openmetrics_is_answered_to_who_accepts_it(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert any(family.name == "onnx_qat_jobs_finished" for family in open_metrics(answer.text))


def test_a_port_of_their_own_asks_for_no_key(start_client) -> None:
    port = free_port()
    client = start_client(auth="keys", metrics_port=port)
    assert client.get("/metrics").status_code == 401
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as private:
        assert value(read(private), "onnx_qat_database_up") == 1


def test_the_librarys_stages_are_known(tmp_path: Path) -> None:
    """A stage that is new would be counted as "other"."""
    told: set[str] = set()

    def note(stage: str, fraction: float) -> None:
        told.add(stage)

    model, samples = model_path("mnist-conv"), tmp_path / "samples.npz"
    name = onnx.load(model).graph.input[0].name
    np.savez(samples, **{name: np.random.default_rng(0).random((2, 1, 28, 28), dtype=np.float32)})
    rewriter.prepare(model, tmp_path / "bundle", calibration=samples, progress=note)
    rewriter.finalize(tmp_path / "bundle", tmp_path / "int8.onnx", verify=samples, progress=note)
    assert told <= STAGES
    assert STAGES - told == {"fetch", "start", "publish"}, "these are the service's own"
