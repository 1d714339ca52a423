"""The body of a request appended to a resumable upload."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Final

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import ServiceError, ServiceErrorCode
from service.resumable.headers import Checksum
from service.resumable.service import Part, Progress, ResumableUploads
from service.services import Services
from service.uploads.body import bounded_body
from service.uploads.intake import FileWriter

# How long a client that asks where to go on waits for its earlier request to let go.
_RELEASE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02

# Uploads that this process receives something for.
_receiving: Final[dict[str, asyncio.Timeout]] = {}


async def append(
    services: Services, request: Request, tenant: str, identifier: str, offset: int, checksum: Checksum | None
) -> Progress:
    """Append the body at that offset; what arrived before a connection broke stays, if it has no checksum.

    Raises:
        ServiceError: those of `ResumableUploads.open` and `finish` and of `bounded_body`,
            `upload_offset_mismatch`, `checksum_mismatch`, `upload_aborted`.
    """
    resumable, intake = services.resumable, services.intake
    with intake.admitted():
        part = await intake.start(resumable.open, tenant, identifier)
        running = (part.digest, None if checksum is None else checksum.running)
        digests = [digest for digest in running if digest is not None]
        with closing(FileWriter(intake, part.file, *digests)) as writer:
            _require_offset(part, offset)
            try:
                try:
                    await _receive(services, request, part, writer)
                except (ServiceError, ClientDisconnect) as error:
                    await writer.flush()
                    await intake.start(_keep, resumable, part, checksum is None and not _is_too_long(error))
                    raise
            except OSError:  # no more can be written; what was is not known to match
                if checksum is not None:
                    await intake.start(part.take_back)
                raise
            if checksum is not None and not checksum.matches:
                await intake.start(_keep, resumable, part, False)
                raise ServiceError(
                    ServiceErrorCode.CHECKSUM_MISMATCH,
                    "The body is not what Upload-Checksum says; it was dropped. Send it again.",
                    field="Upload-Checksum",
                )
            return await intake.start(resumable.finish, part)


async def position(services: Services, tenant: str, identifier: str) -> Progress:
    """How far an upload is. An earlier request that still waits for more of it is ended: it is dead.

    Raises:
        ServiceError: those of `ResumableUploads.open` and `finish`.
    """
    loop, start = asyncio.get_running_loop(), services.intake.start
    deadline = loop.time() + _RELEASE_SECONDS
    while True:
        try:
            part = await start(services.resumable.open, tenant, identifier)
            break
        except ServiceError as error:
            if error.cause.code is not ServiceErrorCode.UPLOAD_LOCKED or loop.time() > deadline:
                raise
        if earlier := _receiving.pop(identifier, None):
            earlier.reschedule(loop.time())
        await asyncio.sleep(_POLL_SECONDS)
    with closing(part.file):
        return await start(services.resumable.finish, part)


def _require_offset(part: Part, offset: int) -> None:
    if offset != part.offset:
        raise ServiceError(
            ServiceErrorCode.UPLOAD_OFFSET_MISMATCH,
            f"{part.offset} bytes have arrived; go on from there.",
            field="Upload-Offset",
            headers={"Upload-Offset": str(part.offset)},
        )


async def _receive(services: Services, request: Request, part: Part, writer: FileWriter) -> None:
    """Raises: ServiceError: `upload_aborted`, when another request (`position`) ends it."""
    identifier = part.row.id
    try:
        async with asyncio.timeout(None) as interruption:
            _receiving[identifier] = interruption
            async for piece in bounded_body(request, part.row.bytes - part.offset, services.intake):
                await writer.write(piece)
            await writer.flush()
    except TimeoutError:
        raise ServiceError(
            ServiceErrorCode.UPLOAD_ABORTED,
            "Another request for this upload ended this one, as one does after a connection broke.",
            headers={"Connection": "close"},
        ) from None
    finally:
        _receiving.pop(identifier, None)


def _is_too_long(error: Exception) -> bool:
    return isinstance(error, ServiceError) and error.cause.code is ServiceErrorCode.REQUEST_TOO_LARGE


def _keep(resumable: ResumableUploads, part: Part, sound: bool) -> None:
    """Of a body that did not come to its end, or to a wrong one: all of it or nothing."""
    if not sound:
        part.take_back()
    resumable.finish(part)
