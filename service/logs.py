"""Structured logs: of the service and of the libraries it uses, in one format, with request and job ids."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
import uuid
from typing import Any, Final, TextIO

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing
from service.settings import Settings

log = structlog.get_logger()

REQUEST_ID_HEADER: Final = "X-Request-ID"
_REQUEST_ID: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)
# W3C Trace Context, section 3.2; neither an invalid version nor an invalid trace id.
_TRACE_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_LONGEST: Final = 200
# Errors of libraries may quote these: passwords in URLs, API keys (but for their ids), secrets of webhooks,
# and what follows "Bearer".
_SECRETS: Final = (
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"\b(oqat_[^\W_]+_)[\w-]+"), r"\1***"),
    (re.compile(r"\b(whsec_)[\w+/=-]+"), r"\1***"),
    (re.compile(r"\b(Bearer\s+)[\w.~+/=-]+", re.IGNORECASE), r"\1***"),
)


def configure_logs(settings: Settings) -> None:
    """Send all logs to standard error as the settings say."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        tracing.add_ids,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.log_format == "json"
        else [
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=_printable_traceback,
            ),
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderer,
                _without_secrets,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    # These log whole addresses, and those of webhooks may hold a secret; Alembic how it works, each time.
    for name in ("httpx", "httpcore", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def configure_process_logs(settings: Settings) -> None:
    """As `configure_logs`, and for what is printed past the logs too: where the process is the service's."""
    configure_logs(settings)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_error


def current_request_id() -> str | None:
    """Id of the request that is answered here, or that submitted the job that is worked on."""
    request_id: str | None = structlog.contextvars.get_contextvars().get("request")
    return request_id


def cut(text: str) -> str:
    """The beginning of what a client chose, for a log line: it may be as long as a request's header."""
    return text[:_LONGEST]


def _escaped(text: str) -> str:
    """Without what a terminal would act upon, or show as something else."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def _printable(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # Lines of an event follow each other indented: none of them passes for another event.
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _escaped(value)
    event["event"] = str(event["event"]).replace("\n", "\n    ")
    return event


def _printable_traceback(file: TextIO, error: structlog.typing.ExcInfo) -> None:
    # Without the values of local variables: some are secret, and to show them takes seconds.
    text = io.StringIO()
    structlog.dev.plain_traceback(text, error)
    file.write(_escaped(text.getvalue()))


def _without_secrets(logger: object, method: str, rendered: Any) -> str:
    line: str = rendered
    for secret, replacement in _SECRETS:
        line = secret.sub(replacement, line)
    return line


def _log_thread_error(error: threading.ExceptHookArgs) -> None:
    if error.exc_value is not None:
        name = error.thread.name if error.thread else None
        log.error("thread failed", thread=name, exc_info=error.exc_value)


class RequestLog:
    """ASGI middleware: gives each request an id, returns it in X-Request-ID and logs the answer.

    The id is the client's X-Request-ID, else the trace id of its `traceparent`, else a new one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        # Not unbound at the end: the server logs what escapes from here, in the task that it made for this
        # request. A pipelined request's task begins within the last one's.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request=request_id)
        status = 500  # what is answered to an exception, outside of this
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            path = scope["path"]
            write = log.debug if path.startswith(tracing.QUIET_PATHS) and status < 400 else log.info
            write(
                "request",
                method=cut(scope["method"]),
                path=cut(path),  # never the query
                status=status,
                tenant=scope.get("state", {}).get("tenant"),
                seconds=round(time.monotonic() - started, 3),
            )


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    if _REQUEST_ID.fullmatch(given):
        return given
    trace = _TRACE_PARENT.fullmatch(headers.get("traceparent", ""))
    return trace[1] if trace else uuid.uuid4().hex
