"""The SHA-256 of its body that a request may announce, by RFC 9530 or RFC 3230."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from starlette.datastructures import Headers

from service.errors import ServiceError, ServiceErrorCode

_BYTES: Final = 32
# One member of a dictionary of RFC 8941 whose value is a byte sequence: sha-256=:...:
_STRUCTURED: Final = re.compile(r"sha-256=:([A-Za-z0-9+/=]*):")
_RFC_3230: Final = re.compile(r"sha-256=([A-Za-z0-9+/=]*)", re.IGNORECASE)
# A body has no Content-Encoding here and is sent whole, so that all three are digests of the same bytes.
_PATTERNS: Final = {"Content-Digest": _STRUCTURED, "Repr-Digest": _STRUCTURED, "Digest": _RFC_3230}


def announced_sha256(headers: Headers) -> str | None:
    """The SHA-256 (hexadecimal) that the headers announce; other algorithms are ignored, as the RFCs have it.

    Raises:
        ServiceError: `request_invalid`, when a header is not well-formed or two contradict each other.
    """
    found = {
        digest: name
        for name, pattern in _PATTERNS.items()
        for value in headers.getlist(name)
        for member in value.split(",")
        if (digest := _sha256_of(name, member.strip(), pattern)) is not None
    }
    if len(found) > 1:
        raise _invalid("The headers announce different digests of the same body.", " ".join(found.values()))
    return next(iter(found), None)


def _sha256_of(name: str, member: str, pattern: re.Pattern[str]) -> str | None:
    if not member.lower().startswith("sha-256="):
        return None
    match = pattern.fullmatch(member)
    try:
        digest = base64.b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        digest = b""
    if len(digest) != _BYTES:
        raise _invalid(f"The value of sha-256 is not the base64 of {_BYTES} bytes.", name)
    return digest.hex()


def require_sha256(announced: str | None, actual: str, file: str | None = None) -> None:
    """Raises: ServiceError: `digest_mismatch`, when another digest was announced."""
    if announced is not None and announced != actual:
        raise ServiceError(
            ServiceErrorCode.DIGEST_MISMATCH,
            f"The SHA-256 of what arrived is {actual}, not {announced}; nothing was stored. Send it again.",
            file=file,
        )


def _invalid(detail: str, field: str) -> ServiceError:
    return ServiceError(ServiceErrorCode.REQUEST_INVALID, detail, field=field)
