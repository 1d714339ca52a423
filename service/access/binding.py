"""Where the service may listen: open to everybody only on this machine, unless somebody chose otherwise."""

from __future__ import annotations

import ipaddress
import socket

from service.errors import ServiceError, ServiceErrorCode
from service.settings import Settings


def check_binding(settings: Settings, host: str) -> None:
    """Refuse to be open to a network by default.

    Raises:
        ServiceError: `auth_not_chosen`.
    """
    if settings.auth is None and not is_loopback(host):
        raise ServiceError(
            ServiceErrorCode.AUTH_NOT_CHOSEN,
            f"Other machines can reach {host or 'this address'}, and nobody has chosen who may use the "
            "service. Set ONNX_QAT_AUTH=keys (or --auth keys) and make a key with `onnx-qat keys create`; or "
            "listen on 127.0.0.1; or, where something else keeps strangers out, set ONNX_QAT_AUTH=open (or "
            "--auth open).",
            field="auth",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address, or every address of the name."""
    try:
        addresses = [info[4][0] for info in socket.getaddrinfo(host or None, None)]
    except OSError:
        return False
    # Without a host a server listens everywhere.
    return bool(host) and all(ipaddress.ip_address(address).is_loopback for address in addresses)
