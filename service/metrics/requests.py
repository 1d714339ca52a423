"""Requests, counted and timed by the template of their route."""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import instruments

# A method is a word of the client's choice, and a path that no route has too.
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_NO_ROUTE: Final = "none"


class RequestMetrics:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, received, sent = 500, 0, 0  # the status of what escapes as an exception

        async def count_received() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def count_sent(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        started = time.perf_counter()
        instruments.REQUESTS_IN_PROGRESS.inc()
        try:
            await self._app(scope, count_received, count_sent)
        finally:
            instruments.REQUESTS_IN_PROGRESS.dec()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", _NO_ROUTE)
            instruments.REQUESTS.labels(method, route, str(int(status))).inc()
            instruments.REQUEST_SECONDS.labels(method, route).observe(time.perf_counter() - started)
            instruments.REQUEST_BYTES.labels(route).inc(received)
            instruments.RESPONSE_BYTES.labels(route).inc(sent)
