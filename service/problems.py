"""Errors over HTTP: the status of each code, RFC 9457 problem documents, and their handlers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from rewriter import ErrorCode, QatError
from service.errors import AnyErrorCode, Cause, ServiceError, ServiceErrorCode
from service.logs import REQUEST_ID_HEADER, current_request_id
from service.openapi_examples import cause_example
from service.storage import room
from service.storage.store import StoreUnavailableError
from service.unavailable import DATABASE_UNAVAILABLE

log = structlog.get_logger()

# The HTTP status of every code. A request that is understood and cannot be carried out is 422.
STATUS: Final[Mapping[AnyErrorCode, int]] = {
    **dict.fromkeys([*ErrorCode, *ServiceErrorCode], HTTPStatus.UNPROCESSABLE_ENTITY),
    ErrorCode.MODEL_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.DATA_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.MODEL_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ErrorCode.TRAINING_RUNTIME_MISSING: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.REQUEST_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    ServiceErrorCode.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    ServiceErrorCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.PRECONDITION_FAILED: HTTPStatus.PRECONDITION_FAILED,
    ServiceErrorCode.RANGE_INVALID: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ServiceErrorCode.UNAUTHORIZED: HTTPStatus.UNAUTHORIZED,
    ServiceErrorCode.KEY_INVALID: HTTPStatus.UNAUTHORIZED,
    ServiceErrorCode.KEY_EXPIRED: HTTPStatus.UNAUTHORIZED,
    ServiceErrorCode.KEY_REVOKED: HTTPStatus.UNAUTHORIZED,
    ServiceErrorCode.RATE_LIMITED: HTTPStatus.TOO_MANY_REQUESTS,
    # Not 507, which is the service's own lack of space, and not 413: the request alone is not too large.
    ServiceErrorCode.STORAGE_QUOTA_EXCEEDED: HTTPStatus.FORBIDDEN,
    # Passes by itself, unlike the one above; RFC 6585, section 4.
    ServiceErrorCode.JOB_QUOTA_EXCEEDED: HTTPStatus.TOO_MANY_REQUESTS,
    ServiceErrorCode.HOST_UNKNOWN: HTTPStatus.MISDIRECTED_REQUEST,
    ServiceErrorCode.CROSS_ORIGIN: HTTPStatus.FORBIDDEN,
    ServiceErrorCode.TENANT_EXISTS: HTTPStatus.CONFLICT,
    ServiceErrorCode.TENANT_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.KEY_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.UPLOAD_ABORTED: HTTPStatus.BAD_REQUEST,
    ServiceErrorCode.UPLOAD_TIMEOUT: HTTPStatus.REQUEST_TIMEOUT,
    ServiceErrorCode.UPLOADS_BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.CONTENT_ENCODING_UNSUPPORTED: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    ServiceErrorCode.CONTENT_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.UPLOAD_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.UPLOAD_EXPIRED: HTTPStatus.GONE,
    ServiceErrorCode.UPLOAD_LOCKED: HTTPStatus.LOCKED,
    ServiceErrorCode.UPLOAD_UNFINISHED: HTTPStatus.CONFLICT,
    ServiceErrorCode.UPLOAD_OFFSET_MISMATCH: HTTPStatus.CONFLICT,
    ServiceErrorCode.CHECKSUM_MISMATCH: 460,  # tus 1.0, extension checksum
    ServiceErrorCode.TUS_VERSION_UNSUPPORTED: HTTPStatus.PRECONDITION_FAILED,
    ServiceErrorCode.CHECKPOINT_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.JOB_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.UPLOAD_IN_USE: HTTPStatus.CONFLICT,
    ServiceErrorCode.JOB_FINISHED: HTTPStatus.CONFLICT,
    ServiceErrorCode.JOB_NOT_FINISHED: HTTPStatus.CONFLICT,
    ServiceErrorCode.JOB_NOT_RETRYABLE: HTTPStatus.CONFLICT,
    ServiceErrorCode.JOB_IN_USE: HTTPStatus.CONFLICT,
    ServiceErrorCode.JOB_NOT_SUCCEEDED: HTTPStatus.CONFLICT,
    ServiceErrorCode.FILE_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.EVENT_STREAMS_EXCEEDED: HTTPStatus.TOO_MANY_REQUESTS,
    ServiceErrorCode.WORKER_CRASHED: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_TIMEOUT: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_LOST: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_OUT_OF_MEMORY: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_OUTPUT_TOO_LARGE: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WEBHOOK_SECRET_MISSING: HTTPStatus.CONFLICT,
    ServiceErrorCode.WEBHOOK_LIMIT_REACHED: HTTPStatus.CONFLICT,
    ServiceErrorCode.DELIVERY_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.NOT_READY: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.DATABASE_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.STORE_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.STORAGE_FULL: HTTPStatus.INSUFFICIENT_STORAGE,
    ServiceErrorCode.INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"


class Problem(Cause):
    """An RFC 9457 problem document."""

    type: str = Field(description="URI of the kind of problem; one for each code")
    title: str = Field(description="the code in words")
    status: int = Field(description="the HTTP status")
    request_id: str | None = Field(
        default=None, description="by which the service's log names the request; X-Request-ID too"
    )

    @classmethod
    def from_cause(cls, cause: Cause, request_id: str | None = None) -> Problem:
        return cls(
            type=f"urn:onnx-qat:problem:{cause.code}",
            title=cause.code.replace("_", " ").capitalize(),
            status=STATUS[cause.code],
            request_id=request_id,
            **dict(cause),
        )


# What any request can meet.
_ALWAYS: Final = (ServiceErrorCode.INTERNAL_ERROR, ServiceErrorCode.DATABASE_UNAVAILABLE)
# What any request in the name of a tenant can meet.
_ACCESS: Final = (
    ServiceErrorCode.UNAUTHORIZED,
    ServiceErrorCode.KEY_INVALID,
    ServiceErrorCode.KEY_EXPIRED,
    ServiceErrorCode.KEY_REVOKED,
    ServiceErrorCode.RATE_LIMITED,
    ServiceErrorCode.HOST_UNKNOWN,
    ServiceErrorCode.CROSS_ORIGIN,
)


def problem_responses(*codes: AnyErrorCode, public: bool = False) -> dict[int | str, dict[str, Any]]:
    """The error responses of an endpoint for its OpenAPI description, grouped by status.

    A public endpoint is one that asks nobody for a key.
    """
    by_status: dict[int | str, list[AnyErrorCode]] = {}
    for code in (*codes, *_ALWAYS, *(() if public else _ACCESS)):
        by_status.setdefault(int(STATUS[code]), []).append(code)
    return {status: _problem_response(group) for status, group in sorted(by_status.items())}


def _problem_response(codes: Sequence[AnyErrorCode]) -> dict[str, Any]:
    problems = {code: Problem.from_cause(cause_example(code)) for code in codes}
    examples = {
        str(code): {"value": problem.model_dump(mode="json", exclude_none=True)}
        for code, problem in problems.items()
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": "Codes: " + ", ".join(f"`{code}`" for code in codes),
        "content": {PROBLEM_MEDIA_TYPE: {"schema": schema, "examples": examples}},
    }


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application with a problem document.

    The handlers are coroutines: the threads, which others would take, may all be waiting for the database.
    """
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(QatError, _on_qat_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(OSError, _on_os_error)
    for error in DATABASE_UNAVAILABLE:
        app.add_exception_handler(error, _on_database_error)
    app.add_exception_handler(StoreUnavailableError, _on_store_error)
    app.add_exception_handler(Exception, _on_unexpected)


def _answer(cause: Cause, headers: Mapping[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    request_id = current_request_id()
    if request_id is not None:
        # Answers to unexpected errors are made outside of all middleware.
        headers[REQUEST_ID_HEADER] = request_id
    return Response(
        Problem.from_cause(cause, request_id).model_dump_json(exclude_none=True),
        status_code=int(STATUS[cause.code]),
        headers=headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _answer(error.cause, error.headers)


async def _on_qat_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QatError)
    return _answer(Cause.of(error))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The first part says where FastAPI looked (body, query, path, header).
    source, *location = first["loc"]
    if first["type"] == "json_invalid":
        location = []
    elif source == "body":
        location = _without_tags(location, error.body, is_missing=first["type"] == "missing")
    detail = first["msg"]
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        location.append(first["ctx"]["discriminator"].strip("'"))
        # Pydantic writes the members of an enumeration as Python does.
        tags = re.findall(r"'[^']*'", first["ctx"].get("expected_tags", ""))
        detail = f"Input should be {' or '.join(tags)}" if tags else "Field required"
    field = ".".join(str(part) for part in location) or None
    return _answer(Cause(code=ServiceErrorCode.REQUEST_INVALID, detail=f"{detail}.", field=field))


def _without_tags(location: Sequence[int | str], body: Any, *, is_missing: bool) -> list[int | str]:
    """A place in the body, without what Pydantic puts there: names of the forms that a value can have."""
    place: list[int | str] = []
    for number, part in enumerate(location, 1):
        if isinstance(body, dict) and (part in body or (is_missing and number == len(location))):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            continue
        place.append(part)
    return place


_HTTP_CODES: Final = {
    HTTPStatus.NOT_FOUND: (ServiceErrorCode.NOT_FOUND, "There is nothing at this address."),
    HTTPStatus.METHOD_NOT_ALLOWED: (
        ServiceErrorCode.METHOD_NOT_ALLOWED,
        "This address does not take this method; the Allow header names those it takes.",
    ),
}


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Errors that FastAPI and Starlette raise themselves: routing, and bodies that are not JSON at all."""
    assert isinstance(error, HTTPException)
    fallback = (ServiceErrorCode.REQUEST_INVALID, str(error.detail))
    code, detail = _HTTP_CODES.get(HTTPStatus(error.status_code), fallback)
    headers = error.headers
    if code is ServiceErrorCode.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route at this address only.
        headers = {"Allow": ", ".join(sorted(_methods_at(request)))}
    return _answer(Cause(code=code, detail=detail), headers)


_METHODS: Final = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


def _methods_at(request: Request) -> set[str]:
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return {
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    }


async def _on_disconnect(request: Request, error: Exception) -> Response:
    # Nobody reads this answer; it keeps an aborted upload from being logged as a fault of the service.
    return _answer(Cause(code=ServiceErrorCode.UPLOAD_ABORTED, detail="The client closed the connection."))


async def _on_database_error(request: Request, error: Exception) -> Response:
    original = error.orig if isinstance(error, DBAPIError) else None
    if getattr(original, "sqlite_errorname", None) == "SQLITE_FULL":
        return _storage_full(error)
    log.error("the database does not answer", error=str(error))
    cause = Cause(
        code=ServiceErrorCode.DATABASE_UNAVAILABLE,
        detail="The database did not answer; nothing was changed or the change is complete. Try again.",
    )
    return _answer(cause, {"Retry-After": "2"})


async def _on_store_error(request: Request, error: Exception) -> Response:
    log.error("the store does not answer", error=str(error))
    cause = Cause(
        code=ServiceErrorCode.STORE_UNAVAILABLE,
        detail="The store of files did not answer; nothing was changed. Try again.",
    )
    return _answer(cause, {"Retry-After": "2"})


async def _on_os_error(request: Request, error: Exception) -> Response:
    if room.is_full(error):
        return _storage_full(error)
    log.exception("unexpected error", exc_info=error)
    return await _on_unexpected(request, error)


def _storage_full(error: Exception) -> Response:
    log.error("storage is full", error=str(error))
    return _answer(Cause(code=ServiceErrorCode.STORAGE_FULL, detail="The service is out of disk space."))


async def _on_unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, and the server logs it.
    return _answer(
        Cause(code=ServiceErrorCode.INTERNAL_ERROR, detail="The service failed; its log says why.")
    )
