"""Traces: of a request, of the job that it submitted, of its stages; and nothing of all that unasked."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import structlog
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from service_helpers import submit, wait_for, wait_until

from service import tracing
from service.jobs.states import JobKind
from service.worker.stages import Stages

TRACE = 0x4BF92F3577B34DA6A3CE929D0E0E4736
PARENT = f"00-{TRACE:032x}-00f067aa0ba902b7-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Traces are made, and kept in memory."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    yield exporter
    tracing.shut_down()


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def test_a_job_is_a_trace_that_links_to_the_request_which_submitted_it(
    exporter: InMemorySpanExporter, client: TestClient
) -> None:
    job = submit(client, {}, headers={"traceparent": PARENT, "X-Request-ID": "r1"})
    wait_for(client, job)
    wait_until(lambda: any(span.name == "job prepare" for span in exporter.get_finished_spans()))
    request, work = named(exporter, "POST /v1/prepare"), named(exporter, "job prepare")
    assert request.kind is SpanKind.SERVER
    assert request.context is not None
    assert request.context.trace_id == TRACE
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 202
    (link,) = work.links
    assert (link.context.trace_id, link.context.span_id) == (TRACE, request.context.span_id)
    assert work.context is not None
    assert work.parent is None
    assert work.context.trace_id != TRACE
    assert work.attributes == {"onnx_qat.job": job, "onnx_qat.attempt": 1, "onnx_qat.request": "r1"}
    for stage in ("fetch", "start", "other", "publish"):
        span = named(exporter, stage)
        assert span.parent is not None
        assert span.parent.span_id == work.context.span_id


def test_the_span_of_a_failed_job_says_so(exporter: InMemorySpanExporter, client: TestClient) -> None:
    wait_for(client, submit(client, {"do": "segfault"}))
    wait_until(lambda: any(span.name == "job prepare" for span in exporter.get_finished_spans()))
    work = named(exporter, "job prepare")
    assert work.status.status_code is StatusCode.ERROR
    assert work.attributes is not None
    assert work.attributes["error.type"] == "worker_crashed"


def test_what_watches_the_service_is_not_traced(exporter: InMemorySpanExporter, client: TestClient) -> None:
    for path in ("/health/ready", "/metrics", "/v1/jobs"):
        client.get(path)
    assert [span.name for span in exporter.get_finished_spans()] == ["GET /v1/jobs"]


def test_logs_name_the_span(exporter: InMemorySpanExporter) -> None:
    with tracing.job_span("prepare", None, {}):
        event = tracing.add_ids(structlog.get_logger(), "info", {"event": "x"})
    span = named(exporter, "job prepare")
    assert span.context is not None
    assert event["trace_id"] == f"{span.context.trace_id:032x}"
    assert event["span_id"] == f"{span.context.span_id:016x}"


def test_a_hostile_process_makes_no_end_of_spans(exporter: InMemorySpanExporter) -> None:
    with Stages(JobKind.PREPARE) as stages:
        for number in range(1000):
            stages.enter(("load", "write")[number % 2])
    assert len(exporter.get_finished_spans()) < 100


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
)
def test_traces_are_made_when_the_standard_variables_ask_for_them(
    environment: dict[str, str], wanted: bool
) -> None:
    assert tracing.is_wanted(environment) is wanted


def test_without_the_extra_the_service_runs_without_traces(
    monkeypatch: pytest.MonkeyPatch, start_client
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert start_client().get("/v1/jobs").status_code == 200
    assert tracing.current_parent() is None


def test_nothing_is_imported_unasked(tmp_path: Path) -> None:
    script = (
        "import sys; from service.app import create_app; from service.settings import Settings; "
        "create_app(Settings()); "
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', "
        "'opentelemetry.exporter'))])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


class Collector:
    """Takes traces over OTLP/HTTP, as an OpenTelemetry collector does. Use as a context manager."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/v1/traces":
                    outer.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_traces_reach_a_collector(start_server) -> None:
    with Collector() as collector:
        server = start_server(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        with server.client() as client:
            wait_for(client, submit(client, {}))
        server.stop()
    resources = [spans for request in collector.requests for spans in request.resource_spans]
    services = {
        attribute.value.string_value
        for resource in resources
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    }
    names = {span.name for resource in resources for scope in resource.scope_spans for span in scope.spans}
    assert services == {"onnx-qat"}
    assert names >= {"POST /v1/prepare", "job prepare", "fetch", "start", "publish"}
