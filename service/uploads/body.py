"""The body of a request as it arrives: bounded, not encoded, not too slow, as long as it was said to be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

from fastapi import Request

from service.errors import ServiceError, ServiceErrorCode
from service.uploads.intake import Intake

# What must have arrived in each period of `upload_timeout_seconds`, so that trickling does not help.
_PACE: Final = 64 << 10
# The connection is of no use when the rest of a body is not read.
_CLOSE: Final = {"Connection": "close"}


async def bounded_body(request: Request, limit: int, intake: Intake) -> AsyncIterator[bytes]:
    """The request's body, piece by piece.

    Raises:
        ServiceError: `request_too_large` (more than `limit` bytes), `content_encoding_unsupported`,
            `upload_timeout`, `upload_aborted`.
        ClientDisconnect: the client closed the connection before the end; answered as `upload_aborted`.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ServiceError(
            ServiceErrorCode.CONTENT_ENCODING_UNSUPPORTED,
            "Send the body as it is, without Content-Encoding.",
            field="Content-Encoding",
            headers={"Accept-Encoding": "identity", **_CLOSE},  # RFC 9110, section 15.5.16
        )
    length = _content_length(request)
    if length is not None and length > limit:
        raise _too_large(limit)
    size = 0
    async for piece in _paced(request, intake.settings.upload_timeout_seconds, intake):
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        yield piece
    if length is not None and size != length:
        raise ServiceError(
            ServiceErrorCode.UPLOAD_ABORTED,
            f"The body has {size} bytes and not {length}, as Content-Length says.",
        )


def media_type_of(request: Request) -> str:
    """The media type of the request's body, without parameters; empty when it names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _paced(request: Request, seconds: float, intake: Intake) -> AsyncIterator[bytes]:
    """The body's pieces. Only the time is counted in which the client keeps us waiting."""
    pieces = request.stream()
    patience, arrived, is_large = seconds, 0, False
    while True:
        if is_large and intake.is_shared:
            async with intake.turn:
                await asyncio.sleep(0)
        started = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise ServiceError(
                ServiceErrorCode.UPLOAD_TIMEOUT,
                f"Fewer than {_PACE} bytes arrived in {seconds:g} seconds.",
                headers=_CLOSE,
            ) from None
        if piece is None:
            return
        patience -= time.monotonic() - started
        arrived += len(piece)
        if arrived >= _PACE:
            patience, arrived, is_large = seconds, 0, True
        if piece:
            yield piece


def _content_length(request: Request) -> int | None:
    value = request.headers.get("content-length", "")
    return int(value) if value.isdecimal() else None


def _too_large(limit: int) -> ServiceError:
    return ServiceError(
        ServiceErrorCode.REQUEST_TOO_LARGE, f"The request is larger than {limit} bytes.", headers=_CLOSE
    )
