"""API keys: `oqat_ID_SECRET`, of which only the SHA-256 is kept.

The secret has 256 random bits, so nobody can guess it, neither here nor from its hash. Slow, salted hashes
(bcrypt, Argon2) make guessing the passwords of people dear; here they would make only requests dear.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Final

from service.errors import ServiceError, ServiceErrorCode

_PATTERN: Final = re.compile(r"oqat_([0-9a-f]{16})_[A-Za-z0-9_-]{43}", re.ASCII)
_SECRET_BYTES: Final = 32
_REALM: Final = 'Bearer realm="onnx-qat"'


@dataclass(frozen=True)
class NewKey:
    """A key that was just made; `text` is what its owner gets, once."""

    id: str
    text: str

    @classmethod
    def random(cls) -> NewKey:
        identifier = secrets.token_hex(8)
        return cls(identifier, f"oqat_{identifier}_{secrets.token_urlsafe(_SECRET_BYTES)}")


def hash_of(key: str) -> str:
    """What is kept of a key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_hash_of(kept: str, key: str) -> bool:
    """Compares in a time that does not tell how much is right."""
    return hmac.compare_digest(kept, hash_of(key))


def id_of(key: str) -> str | None:
    """The id in a key; None when this is no key."""
    match = _PATTERN.fullmatch(key)
    return match and match[1]


def unauthorized(detail: str) -> ServiceError:
    """No credential came (RFC 6750, section 3.1: the challenge then names no error)."""
    return ServiceError(
        ServiceErrorCode.UNAUTHORIZED, detail, field="Authorization", headers={"WWW-Authenticate": _REALM}
    )


def refused(code: ServiceErrorCode, detail: str) -> ServiceError:
    """The credential is not good."""
    challenge = f'{_REALM}, error="invalid_token", error_description="{detail}"'
    return ServiceError(code, detail, field="Authorization", headers={"WWW-Authenticate": challenge})
