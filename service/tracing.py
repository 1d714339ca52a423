"""OpenTelemetry traces: of requests, of jobs and of their stages.

On when the standard variables name where traces go (OTEL_EXPORTER_OTLP_ENDPOINT, or the one for traces, or
OTEL_TRACES_EXPORTER=otlp) and the extra `otel` is installed. Else nothing of it is imported. The other
standard variables (service name, sampler, headers, batches) are read by OpenTelemetry itself.

A job's trace is its own, because it may begin long after the request has ended: its span links to the request
that submitted it (OpenTelemetry specification, "Links between spans").
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import structlog

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = structlog.get_logger()

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

QUIET_PATHS: Final = ("/health/", "/metrics")
"""Asked for every few seconds by what watches the service."""

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's variables ask for traces over OTLP."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter not in ("", "otlp"):
        return False
    return exporter == "otlp" or any(environment.get(name) for name in _ENDPOINTS)


def configure() -> None:
    """Begin to trace if that is wanted."""
    if not is_wanted():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("traces are configured and not made: install the extra 'otel'")
        return
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": "onnx-qat"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    install(provider)


def of_requests() -> TelemetryConfig:
    """What FastAPI is to record: a span for each request, a child of the client's (`traceparent`)."""
    nothing: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    if _provider is None:
        return nothing
    return {
        **nothing,
        "tracing": True,
        "tracer_provider": _provider,
        "operation_spans": False,
        "exclude": lambda scope: scope.get("path", "").startswith(QUIET_PATHS),
    }


def install(provider: TracerProvider) -> None:
    """Trace with this provider from now on."""
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer("onnx-qat")


def shut_down() -> None:
    """Send what is not sent yet, for some seconds at most, and trace no more."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.force_flush(3000)
        provider.shutdown()


def add_ids(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Log processor: the ids of the current trace and span."""
    if _tracer is not None and (parent := current_parent()) is not None:
        _, event["trace_id"], event["span_id"], _ = parent.split("-")
    return event


def current_parent() -> str | None:
    """The current span as a `traceparent` (W3C Trace Context, section 3.2)."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


@contextmanager
def job_span(kind: str, submitted_by: str | None, attributes: Mapping[str, str | int]) -> Iterator[None]:
    """A job, in a trace of its own with a link to the span that is `submitted_by` as a `traceparent`."""
    if _tracer is None:
        yield
        return
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, SpanKind

    context = _span_context(submitted_by)
    with _tracer.start_as_current_span(
        f"job {kind}",
        context=Context(),
        kind=SpanKind.CONSUMER,
        links=[] if context is None else [Link(context)],
        attributes=dict(attributes),
    ):
        yield


def start_span(name: str) -> Span | None:
    """A child of the current span; whoever gets it calls its `end`."""
    return None if _tracer is None else _tracer.start_span(name)


def failed(code: str) -> None:
    """Mark the current span as failed, with the code of the cause."""
    if _tracer is None:
        return
    from opentelemetry.trace import Status, StatusCode, get_current_span

    get_current_span().set_attribute("error.type", code)
    get_current_span().set_status(Status(StatusCode.ERROR))


def _span_context(parent: str | None) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    match = _PARENT.fullmatch(parent or "")
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
