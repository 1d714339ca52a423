"""Answers that carry a stored file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import Request, Response
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from service.errors import ServiceError, ServiceErrorCode
from service.uploads.schemas import StoredFile

_RANGE_ERRORS: Final = (400, 416)


class Download(FileResponse):
    """A file with a strong ETag and byte ranges; a bad range is answered with a problem document."""

    @classmethod
    def of(
        cls,
        request: Request,
        path: Path,
        file: StoredFile,
        *,
        filename: str,
        media_type: str = "application/octet-stream",
    ) -> Response:
        # Results never change, so that the digest of the content identifies it.
        headers = {"ETag": f'"{file.sha256}"', "Cache-Control": "private, no-cache"}
        known = {
            tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")
        }
        if known & {headers["ETag"], "*"}:
            return Response(status_code=304, headers=headers)
        return cls(path, headers=headers, filename=filename, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in _RANGE_ERRORS:
                raise ServiceError(
                    ServiceErrorCode.RANGE_INVALID,
                    "The file has no such range.",
                    field="Range",
                    headers={"Content-Range": f"bytes */{Path(self.path).stat().st_size}"},
                )
            await send(message)

        await super().__call__(scope, receive, send_checked)
