"""Open mode in the reach of a browser: other people's pages must not use the service behind its owner's back.

Two things are checked of each request. The host name: a page whose own name is made to lead to 127.0.0.1
(DNS rebinding) is of the same origin to the browser, but the name is not ours. And where the request comes
from (Fetch Metadata, Origin): a page can post a form anywhere without being allowed to read the answer.
With API keys neither matters: a browser sends no key of its own accord.
"""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError, ServiceErrorCode
from service.logs import cut

log = structlog.get_logger()

# Probes come under any name, and learn nothing but "ok".
_ANY_HOST: Final = "/health/"


class BrowserGuard:
    """ASGI middleware: refuses what a page of another origin could make a browser send.

    Raises:
        ServiceError: `host_unknown`, `cross_origin`.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: frozenset[str]) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(_ANY_HOST):
            self._check(scope["method"], Headers(scope=scope))
        await self._app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        host = _host_name(headers.get("host", ""))
        if not (_cannot_be_rebound(host) or host in self._allowed_hosts):
            log.warning("access refused", code=ServiceErrorCode.HOST_UNKNOWN, host=cut(host))
            raise ServiceError(
                ServiceErrorCode.HOST_UNKNOWN,
                "The service does not answer under this name; use its IP address or localhost, or add the "
                "name to ONNX_QAT_ALLOWED_HOSTS.",
                field="Host",
            )
        if _is_cross_origin(method, headers):
            log.warning(
                "access refused", code=ServiceErrorCode.CROSS_ORIGIN, origin=cut(headers.get("origin", ""))
            )
            raise ServiceError(
                ServiceErrorCode.CROSS_ORIGIN,
                "The request comes from a page of another origin, which may not use the service.",
                field="Origin",
            )


def _host_name(host: str) -> str:
    """The name or address in a Host field, without the port and the brackets of IPv6."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cannot_be_rebound(host: str) -> bool:
    """Whether no DNS server of a stranger decides where the name leads (RFC 6761, section 6.3)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_cross_origin(method: str, headers: Headers) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        follows_a_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not follows_a_link
    # Browsers send Sec-Fetch-Site over TLS and to this machine; elsewhere they send Origin.
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()
