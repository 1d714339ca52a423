"""Errors over HTTP: the status of each code, RFC 9457 problem documents, and their handlers."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from rewriter import ErrorCode, QatError
from service.errors import AnyErrorCode, Cause, ServiceError, ServiceErrorCode

log = structlog.get_logger()

# The HTTP status of every code. A request that is understood and cannot be carried out is 422.
STATUS: Final[Mapping[AnyErrorCode, HTTPStatus]] = {
    **dict.fromkeys([*ErrorCode, *ServiceErrorCode], HTTPStatus.UNPROCESSABLE_ENTITY),
    ErrorCode.MODEL_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.DATA_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.MODEL_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ErrorCode.TRAINING_RUNTIME_MISSING: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.REQUEST_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    ServiceErrorCode.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    ServiceErrorCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.RANGE_INVALID: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ServiceErrorCode.UPLOAD_ABORTED: HTTPStatus.BAD_REQUEST,
    ServiceErrorCode.CHECKPOINT_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.JOB_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.JOB_FINISHED: HTTPStatus.CONFLICT,
    ServiceErrorCode.JOB_NOT_SUCCEEDED: HTTPStatus.CONFLICT,
    ServiceErrorCode.FILE_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ServiceErrorCode.WORKER_CRASHED: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_TIMEOUT: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_OUT_OF_MEMORY: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.WORKER_OUTPUT_TOO_LARGE: HTTPStatus.INTERNAL_SERVER_ERROR,
    ServiceErrorCode.NOT_READY: HTTPStatus.SERVICE_UNAVAILABLE,
    ServiceErrorCode.STORAGE_FULL: HTTPStatus.INSUFFICIENT_STORAGE,
    ServiceErrorCode.INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"


class Problem(Cause):
    """An RFC 9457 problem document."""

    type: str = Field(description="URI of the kind of problem; one for each code")
    title: str = Field(description="the code in words")
    status: int = Field(description="the HTTP status")

    @classmethod
    def from_cause(cls, cause: Cause) -> Problem:
        return cls(
            type=f"urn:onnx-qat:problem:{cause.code}",
            title=cause.code.replace("_", " ").capitalize(),
            status=STATUS[cause.code],
            **dict(cause),
        )


def problem_responses(*codes: AnyErrorCode) -> dict[int | str, dict[str, Any]]:
    """The error responses of an endpoint for its OpenAPI description, grouped by status."""
    by_status: dict[int | str, list[AnyErrorCode]] = {}
    for code in (*codes, ServiceErrorCode.INTERNAL_ERROR):
        by_status.setdefault(int(STATUS[code]), []).append(code)
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": "Codes: " + ", ".join(f"`{code}`" for code in group), "content": content}
        for status, group in sorted(by_status.items())
    }


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application with a problem document."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(QatError, _on_qat_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(OSError, _on_os_error)
    app.add_exception_handler(Exception, _on_unexpected)


def _answer(cause: Cause, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        Problem.from_cause(cause).model_dump_json(exclude_none=True),
        status_code=STATUS[cause.code],
        headers=dict(headers or {}),
        media_type=PROBLEM_MEDIA_TYPE,
    )


def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _answer(error.cause, error.headers)


def _on_qat_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QatError)
    return _answer(Cause.of(error))


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The first part says where FastAPI looked (body, query, path, header).
    location = () if first["type"] == "json_invalid" else first["loc"][1:]
    field = ".".join(str(part) for part in location) or None
    return _answer(Cause(code=ServiceErrorCode.REQUEST_INVALID, detail=f"{first['msg']}.", field=field))


_HTTP_CODES: Final = {
    HTTPStatus.NOT_FOUND: (ServiceErrorCode.NOT_FOUND, "There is nothing at this address."),
    HTTPStatus.METHOD_NOT_ALLOWED: (
        ServiceErrorCode.METHOD_NOT_ALLOWED,
        "This address does not take this method; the Allow header names those it takes.",
    ),
}


def _on_http_exception(request: Request, error: Exception) -> Response:
    """Errors that FastAPI and Starlette raise themselves: routing, and bodies that are not JSON at all."""
    assert isinstance(error, HTTPException)
    fallback = (ServiceErrorCode.REQUEST_INVALID, str(error.detail))
    code, detail = _HTTP_CODES.get(HTTPStatus(error.status_code), fallback)
    headers = error.headers
    if code is ServiceErrorCode.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route at this address only.
        headers = {"Allow": ", ".join(sorted(_methods_at(request)))}
    return _answer(Cause(code=code, detail=detail), headers)


def _methods_at(request: Request) -> set[str]:
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST")}
    return {
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    }


def _on_disconnect(request: Request, error: Exception) -> Response:
    # Nobody reads this answer; it keeps an aborted upload from being logged as a fault of the service.
    return _answer(Cause(code=ServiceErrorCode.UPLOAD_ABORTED, detail="The client closed the connection."))


def _on_os_error(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("storage is full", error=str(error))
        return _answer(Cause(code=ServiceErrorCode.STORAGE_FULL, detail="The service is out of disk space."))
    log.exception("unexpected error", exc_info=error)
    return _on_unexpected(request, error)


def _on_unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, and the server logs it.
    return _answer(
        Cause(code=ServiceErrorCode.INTERNAL_ERROR, detail="The service failed; its log says why.")
    )
