"""Answers that carry a stored file, whole or a range of it (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from typing import Annotated, Final
from urllib.parse import quote

from fastapi import Query, Request, Response, status
from fastapi.responses import RedirectResponse, StreamingResponse

from service import entity_tags
from service.errors import ServiceError, ServiceErrorCode
from service.storage.store import Store
from service.uploads.schemas import StoredFile

_RANGE: Final = re.compile(r"\s*(\d{0,100})-(\d{0,100})\s*", re.ASCII)
_SEVERAL_RANGES: Final = re.compile(r"[\d\s,-]+,[\d\s,-]+", re.ASCII)

MayRedirect = Annotated[
    bool,
    Query(
        description="false: the file itself, also where clients are sent to the store for it; scripts of a "
        "browser cannot follow there"
    ),
]


class Download(StreamingResponse):
    """A stored file with a strong ETag and byte ranges."""

    @classmethod
    def of(
        cls,
        request: Request,
        store: Store,
        key: str,
        file: StoredFile,
        *,
        filename: str,
        media_type: str = "application/octet-stream",
        redirect: bool = True,
    ) -> Response:
        """The answer to a request for a file; `redirect`: it may send the client to the store.

        Raises:
            ServiceError: `precondition_failed`, `range_invalid`.
            StoreUnavailableError: the store does not answer.
        """
        # Results never change, so that the digest of the content identifies it.
        etag = f'"{file.sha256}"'
        headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
        if entity_tags.is_unwanted(request.headers, etag):
            raise ServiceError(
                ServiceErrorCode.PRECONDITION_FAILED,
                f"The file's ETag is {etag}, and results never change: If-Match names another file's.",
                field="If-Match",
            )
        if entity_tags.is_known(request.headers, etag):
            return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
        headers |= {
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{quote(filename)}"',
        }
        if request.method == "HEAD":  # which has no ranges, and which a link to the store is not made for
            headers["Content-Length"] = str(file.bytes)
            return Response(headers=headers, media_type=media_type)
        link = store.link(key) if redirect else None
        if link is not None:
            # The client asks there again, with its Range.
            return RedirectResponse(link, headers={"Cache-Control": "private, no-store"})
        start, end = _wanted(request, etag, file.bytes)
        is_part = (start, end) != (0, file.bytes)
        headers["Content-Length"] = str(end - start)
        if is_part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.bytes}"
        return cls(
            store.read(key, start, end),
            status_code=status.HTTP_206_PARTIAL_CONTENT if is_part else status.HTTP_200_OK,
            headers=headers,
            media_type=media_type,
        )


def _wanted(request: Request, etag: str, size: int) -> tuple[int, int]:
    """The bytes from the first up to the second, which is not included: what Range asks for, else all."""
    unit, _, ranges = request.headers.get("range", "").partition("=")
    if unit.strip().lower() != "bytes" or request.headers.get("if-range", etag) != etag:
        return 0, size
    # Several ranges are answered with the whole file, which a server may always do.
    if _SEVERAL_RANGES.fullmatch(ranges):
        return 0, size
    match = _RANGE.fullmatch(ranges)
    first, last = match.groups() if match else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return 0, size  # not a range at all: ignored (RFC 9110, sections 14.1.1 and 14.2)
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:  # the last so many
        start, end = max(0, size - int(last)), size
    if start >= end:
        raise ServiceError(
            ServiceErrorCode.RANGE_INVALID,
            "The file has no such range.",
            field="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end
