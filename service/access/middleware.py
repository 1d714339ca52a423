"""Who may use /v1, and how often: decided before anything of the request's body is read."""

from __future__ import annotations

import hmac
from typing import Final

import anyio.to_thread
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.rates import Rate
from service.errors import ServiceError, ServiceErrorCode
from service.logs import cut
from service.services import Services
from service.settings import AuthMode
from service.tenants.keys import id_of, unauthorized
from service.tenants.service import Caller

log = structlog.get_logger()

_API: Final = "/v1"
_METRICS: Final = "/metrics"


class Access:
    """ASGI middleware: gives requests to /v1 their tenant, or refuses them (RFC 6750).

    The tenant's id is in the request's state as `tenant`, the key's, if any, as `key`. An answer to a
    tenant with a rate limit says what is left of it.

    Raises:
        ServiceError: `unauthorized`, `key_invalid`, `key_expired`, `key_revoked`, `rate_limited`.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path in (_API, _METRICS) or path.startswith(f"{_API}/")):
            await self._app(scope, receive, send)
            return
        credential = _bearer(Headers(scope=scope))
        try:
            if path == _METRICS:
                self._check_metrics(credential)
                await self._app(scope, receive, send)
                return
            caller, rate = await anyio.to_thread.run_sync(self._admit, credential)
        except ServiceError as error:
            log.warning("access refused", code=error.cause.code, path=cut(path), key=id_of(credential or ""))
            raise
        scope.setdefault("state", {}).update(tenant=caller.tenant, key=caller.key)
        with structlog.contextvars.bound_contextvars(tenant=caller.tenant):
            await self._app(scope, receive, send if rate is None else _with_rate(send, rate))

    def _admit(self, credential: str | None) -> tuple[Caller, Rate | None]:
        if self._services.settings.auth is AuthMode.KEYS:
            caller = self._services.tenants.authenticate(credential)
        else:
            caller = self._services.tenants.everybody()
        if caller.requests_per_minute is None:
            return caller, None
        rate = self._services.buckets.take(caller.tenant, caller.requests_per_minute)
        if not rate.allowed:
            raise ServiceError(
                ServiceErrorCode.RATE_LIMITED,
                f"More than {rate.limit} requests a minute; go on after {rate.next_seconds} seconds.",
                headers={**rate.headers, "Retry-After": str(rate.next_seconds)},
            )
        return caller, rate

    def _check_metrics(self, credential: str | None) -> None:
        """Metrics tell of all tenants, so that no tenant's key opens them."""
        token = self._services.settings.metrics_token
        if token is None and self._services.settings.auth is not AuthMode.KEYS:
            return
        if token is None or not hmac.compare_digest(
            (credential or "").encode(), token.get_secret_value().encode()
        ):
            raise unauthorized("Metrics need the token of the setting ONNX_QAT_METRICS_TOKEN.")


def _bearer(headers: Headers) -> str | None:
    """The credential of RFC 6750, section 2.1; the scheme's case does not matter (RFC 9110, section 11.1)."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else None


def _with_rate(send: Send, rate: Rate) -> Send:
    async def send_with_rate(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(rate.headers)
        await send(message)

    return send_with_rate
