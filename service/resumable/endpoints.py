"""Resumable uploads over HTTP: tus 1.0.0, with the extensions that `_EXTENSIONS` names.

Written here because the libraries there are (tuspyserver, fastapi-tusd) write on the event loop, sync nothing
to disk, have no checksums, answer errors as text and keep an upload in files of their own instead of
the database with its tenants and quotas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from email.utils import format_datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Request, Response, status
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from service.dependencies import InServices, Tenant
from service.errors import ServiceError, ServiceErrorCode
from service.problems import problem_responses
from service.resumable.headers import CHECKSUMS, LARGEST_NUMBER, Checksum, Metadata, whole_number
from service.resumable.receiving import append, position
from service.resumable.service import Progress
from service.uploads.body import media_type_of

_VERSION: Final = "1.0.0"
_EXTENSIONS: Final = "creation,creation-with-upload,expiration,checksum,termination"
_PIECE: Final = "application/offset+octet-stream"


class TusRoute(APIRoute):
    """A route whose every answer, errors included, names the version of the protocol.

    For clients that can only POST a header may name the method.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(_with_named_method(scope))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Tus-Resumable"] = _VERSION
            await send(message)

        await super().handle(_with_named_method(scope), receive, send_with_version)


def _with_named_method(scope: Scope) -> Scope:
    method = Headers(scope=scope).get("X-HTTP-Method-Override")
    return {**scope, "method": method.upper()} if method and scope["method"] == "POST" else scope


def _require_version(request: Request) -> None:
    if request.headers.get("Tus-Resumable") != _VERSION:
        raise ServiceError(
            ServiceErrorCode.TUS_VERSION_UNSUPPORTED,
            f"Tus-Resumable must be {_VERSION}.",
            field="Tus-Resumable",
            headers={"Tus-Version": _VERSION},
        )


router = APIRouter(prefix="/v1/uploads/tus", tags=["resumable uploads"], route_class=TusRoute)

_VERSIONED: Final = [Depends(_require_version)]
_NO_CONTENT: Final = status.HTTP_204_NO_CONTENT
_OPEN_ERRORS: Final = (
    ServiceErrorCode.TUS_VERSION_UNSUPPORTED,
    ServiceErrorCode.REQUEST_INVALID,
    ServiceErrorCode.UPLOAD_NOT_FOUND,
    ServiceErrorCode.UPLOAD_EXPIRED,
    ServiceErrorCode.UPLOAD_LOCKED,
)
_FINISH_ERRORS: Final = (
    ServiceErrorCode.STORAGE_QUOTA_EXCEEDED,
    ServiceErrorCode.DIGEST_MISMATCH,
    ServiceErrorCode.STORAGE_FULL,
    ServiceErrorCode.STORE_UNAVAILABLE,
)
_BODY_ERRORS: Final = (
    *_FINISH_ERRORS,
    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED,
    ServiceErrorCode.CONTENT_ENCODING_UNSUPPORTED,
    ServiceErrorCode.REQUEST_TOO_LARGE,
    ServiceErrorCode.UPLOAD_ABORTED,
    ServiceErrorCode.UPLOAD_TIMEOUT,
    ServiceErrorCode.UPLOADS_BUSY,
    ServiceErrorCode.CHECKSUM_MISMATCH,
)

ResumableId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
_RESUMABLE: Final = ("Tus-Resumable", "version of the protocol")
_LENGTH: Final = ("Upload-Length", "size of the file in bytes")
_OFFSET: Final = ("Upload-Offset", "how many bytes have arrived")
_EXPIRES: Final = ("Upload-Expires", "when the upload is removed unless it grows before that")
_LINK: Final = ("Link", "the model, data set or checkpoint that the file has become, rel=related")


_BASE64: Final = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_PAIR: Final = rf"[!-+\-.-~]+(?: {_BASE64})?"
# By the name of a header field of requests, which are parsed here.
_SCHEMAS: Final[Mapping[str, dict[str, Any]]] = {
    "Tus-Resumable": {"type": "string", "const": _VERSION},
    "Upload-Length": {"type": "integer", "minimum": 1, "maximum": LARGEST_NUMBER},
    "Upload-Offset": {"type": "integer", "minimum": 0, "maximum": LARGEST_NUMBER},
    "Upload-Metadata": {"type": "string", "pattern": f"^(?:{_PAIR}(?:,{_PAIR})*)?$"},
}


def _documented(*fields: tuple[str, str], optional: Sequence[str] = (), body: bool = False) -> dict[str, Any]:
    """OpenAPI for header fields of a request, and for a piece of a file as its body."""
    parameters = [
        {
            "name": name,
            "in": "header",
            "required": name not in optional,
            "description": text,
            "schema": _SCHEMAS[name],
        }
        for name, text in (_RESUMABLE, *fields)
    ]
    content = {_PIECE: {"schema": {"type": "string", "format": "binary"}}}
    return {"parameters": parameters, **({"requestBody": {"content": content}} if body else {})}


def _answers(code: int, description: str, *fields: tuple[str, str]) -> dict[int | str, dict[str, Any]]:
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in fields}
    return {code: {"description": description, "headers": headers}}


def _state(progress: Progress) -> dict[str, str]:
    headers = {
        "Upload-Offset": str(progress.offset),
        "Upload-Expires": format_datetime(progress.expires_at, usegmt=True),
        "Cache-Control": "no-store",
    }
    if progress.stored_as is not None:
        headers["Link"] = f'</v1/{progress.stored_as}/{progress.sha256}>; rel="related"'
    return headers


@router.options("", status_code=_NO_CONTENT, responses=problem_responses())
def tell_capabilities(services: InServices, tenant: Tenant) -> Response:
    """What this server can do of the protocol."""
    headers = {
        "Tus-Version": _VERSION,
        "Tus-Extension": _EXTENSIONS,
        "Tus-Max-Size": str(int(services.settings.max_upload_bytes)),
        "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
    }
    return Response(status_code=_NO_CONTENT, headers=headers)


_METADATA: Final = (
    "Upload-Metadata",
    "pairs of key and base64; with `kind` (models, datasets, checkpoints) the complete file becomes that by "
    "itself, without it the file waits to be put together with others; `sha256` (hexadecimal) is checked",
)


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_class=Response,
    dependencies=_VERSIONED,
    responses={
        **_answers(201, "Begun; Location is the address of the upload", _OFFSET, _EXPIRES, _LINK),
        **problem_responses(*_OPEN_ERRORS[:2], *_BODY_ERRORS, ServiceErrorCode.UPLOAD_EMPTY),
    },
    openapi_extra=_documented(_LENGTH, _METADATA, optional=["Upload-Metadata"], body=True),
)
async def begin_upload(request: Request, services: InServices, tenant: Tenant) -> Response:
    """Begin an upload; the body may be the beginning of the file."""
    headers = request.headers
    size = whole_number(headers, "Upload-Length")
    metadata = Metadata.parse(headers.get("Upload-Metadata", ""))
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    checksum = _checksum(request) if has_body else None
    if has_body:
        _require_piece(request)
    progress = await services.intake.start(services.resumable.create, tenant, size, metadata)
    location = f"{router.prefix}/{progress.id}"
    if has_body:
        progress = await append(services, request, tenant, progress.id, 0, checksum)
    return Response(status_code=status.HTTP_201_CREATED, headers={"Location": location, **_state(progress)})


@router.head(
    "/{resumable_id}",
    response_class=Response,
    dependencies=_VERSIONED,
    openapi_extra=_documented(),
    responses={
        **_answers(200, "How far the upload is", _OFFSET, _LENGTH, _METADATA, _EXPIRES, _LINK),
        **problem_responses(*_OPEN_ERRORS, *_FINISH_ERRORS),
    },
)
async def tell_offset(resumable_id: ResumableId, services: InServices, tenant: Tenant) -> Response:
    """Where to go on."""
    progress = await position(services, tenant, resumable_id)
    headers = {"Upload-Length": str(progress.bytes), **_state(progress)}
    if progress.metadata:
        headers["Upload-Metadata"] = progress.metadata
    return Response(headers=headers)


@router.patch(
    "/{resumable_id}",
    status_code=_NO_CONTENT,
    dependencies=_VERSIONED,
    responses={
        **_answers(204, "Appended", _OFFSET, _EXPIRES, _LINK),
        **problem_responses(*_OPEN_ERRORS, *_BODY_ERRORS, ServiceErrorCode.UPLOAD_OFFSET_MISMATCH),
    },
    openapi_extra=_documented(_OFFSET, body=True),
)
async def continue_upload(
    resumable_id: ResumableId, request: Request, services: InServices, tenant: Tenant
) -> Response:
    """Append to an upload. With Upload-Checksum the body is kept only if it matches."""
    _require_piece(request)
    offset = whole_number(request.headers, "Upload-Offset")
    progress = await append(services, request, tenant, resumable_id, offset, _checksum(request))
    return Response(status_code=_NO_CONTENT, headers=_state(progress))


@router.delete(
    "/{resumable_id}",
    status_code=_NO_CONTENT,
    dependencies=_VERSIONED,
    responses=problem_responses(*_OPEN_ERRORS),
    openapi_extra=_documented(),
)
async def end_upload(resumable_id: ResumableId, services: InServices, tenant: Tenant) -> Response:
    """Remove an upload and what has arrived of it; a model, data set or checkpoint made from it stays."""
    await services.intake.start(services.resumable.remove, tenant, resumable_id)
    return Response(status_code=_NO_CONTENT)


def _checksum(request: Request) -> Checksum | None:
    value = request.headers.get("Upload-Checksum")
    return None if value is None else Checksum.parse(value)


def _require_piece(request: Request) -> None:
    if media_type_of(request) != _PIECE:
        raise ServiceError(ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED, f"Send pieces of a file as {_PIECE}.")
