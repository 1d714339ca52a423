"""The header fields of tus 1.0 that have a structure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from service.errors import ServiceError, ServiceErrorCode
from service.uploads.kinds import UploadKind

if TYPE_CHECKING:
    from hashlib import _Hash

# As much as the database keeps of it.
_LARGEST_METADATA: Final = 4096
_KEY: Final = re.compile(r"[!-+\--~]+", re.ASCII)  # printable, without space and comma
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)

CHECKSUMS: Final[Mapping[str, Callable[[], _Hash]]] = {"sha256": hashlib.sha256, "sha1": hashlib.sha1}
"""Algorithms of Upload-Checksum; the protocol demands sha1."""


@dataclass(frozen=True)
class Metadata:
    """What Upload-Metadata says: `kind` and `sha256` mean something here, the rest is the client's own."""

    text: str
    kind: UploadKind | None
    sha256: str | None

    @classmethod
    def parse(cls, text: str) -> Metadata:
        """Raises: ServiceError: `request_invalid`."""
        if len(text) > _LARGEST_METADATA:
            raise _invalid(f"It is longer than {_LARGEST_METADATA} bytes.", "Upload-Metadata")
        values: dict[str, bytes] = {}
        for pair in text.split(",") if text.strip() else ():
            key, _, encoded = pair.strip().partition(" ")
            if _KEY.fullmatch(key) is None or key in values:
                raise _invalid("It has a key twice, or one that is no key.", "Upload-Metadata")
            values[key] = _decoded(encoded.strip(), "Upload-Metadata")
        kind = values.get("kind", b"").decode(errors="replace")
        if kind and kind not in list(UploadKind):
            raise _invalid(f"kind is one of {', '.join(UploadKind)}, or absent.", "Upload-Metadata")
        sha256 = values.get("sha256", b"").decode(errors="replace").lower()
        if sha256 and _SHA256.fullmatch(sha256) is None:
            raise _invalid("sha256 is 64 hexadecimal digits, or absent.", "Upload-Metadata")
        return cls(text, UploadKind(kind) if kind else None, sha256 or None)


@dataclass(frozen=True)
class Checksum:
    """What Upload-Checksum says of a request's body."""

    running: _Hash
    expected: bytes

    @classmethod
    def parse(cls, text: str) -> Checksum:
        """Raises: ServiceError: `request_invalid`."""
        algorithm, _, encoded = text.partition(" ")
        if algorithm not in CHECKSUMS:
            raise _invalid(f"The algorithm is one of {', '.join(CHECKSUMS)}.", "Upload-Checksum")
        return cls(CHECKSUMS[algorithm](), _decoded(encoded, "Upload-Checksum"))

    @property
    def matches(self) -> bool:
        return self.running.digest() == self.expected


LARGEST_NUMBER: Final = 10**18 - 1


def whole_number(headers: Mapping[str, str], name: str) -> int:
    """The value of a header field that is a number of bytes. Raises: ServiceError: `request_invalid`."""
    value: Any = headers.get(name, "")
    if re.fullmatch(r"0|[1-9][0-9]{0,17}", value, re.ASCII) is None:
        raise _invalid("It must be there and be a number of bytes.", name)
    return int(value)


def _decoded(encoded: str, field: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise _invalid("A value is not base64.", field) from error


def _invalid(detail: str, field: str) -> ServiceError:
    return ServiceError(ServiceErrorCode.REQUEST_INVALID, f"{field}: {detail}", field=field)
