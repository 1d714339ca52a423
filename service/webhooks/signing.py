"""Signatures of webhooks as the Standard Webhooks specification (1.0.0) has them: symmetric, version v1."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

_PREFIX: Final = "whsec_"
# The specification asks for keys of 24 to 64 bytes.
_KEY_BYTES: Final = 32
_SHORTEST: Final = 24
_LONGEST: Final = 64


def new_secret() -> str:
    """A random secret as it is shown to people: `whsec_` and base64."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()


def key_of(secret: str) -> bytes:
    """The bytes to sign with.

    Raises:
        ValueError: this is not `whsec_` and the base64 of 24 to 64 bytes.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("the secret is not base64") from error
    if not secret.startswith(_PREFIX) or not _SHORTEST <= len(key) <= _LONGEST:
        raise ValueError("the secret is not `whsec_` and the base64 of 24 to 64 bytes")
    return key


def signed_headers(keys: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a message that is signed with each of the secrets.

    Args:
        keys: secrets as `new_secret` makes them; a receiver needs one of them.
        message_id: the same at each attempt, so that a receiver knows what it has seen.
        timestamp: seconds since 1970, of this attempt.
    """
    content = f"{message_id}.{timestamp}.".encode() + body
    signatures = [
        "v1," + base64.b64encode(hmac.digest(key_of(key), content, hashlib.sha256)).decode() for key in keys
    ]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }
