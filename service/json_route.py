"""Routes whose bodies are JSON."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message

from service.errors import ServiceError, ServiceErrorCode
from service.uploads.body import bounded_body, media_type_of
from service.uploads.intake import Intake


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is JSON of bounded size: FastAPI alone reads a body of any size."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            if media_type_of(request) != "application/json":
                raise ServiceError(
                    ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED, "Send the request as application/json."
                )
            intake: Intake = request.app.state.services.intake
            body = bounded_body(request, intake.settings.max_request_bytes, intake)
            pieces = [piece async for piece in body]

            async def replay() -> Message:
                return {"type": "http.request", "body": b"".join(pieces), "more_body": False}

            return await handle(Request(request.scope, replay))

        return handle_json
