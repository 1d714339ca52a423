"""Metrics over HTTP."""

from __future__ import annotations

from typing import Final

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.dependencies import InServices
from service.errors import ServiceErrorCode
from service.problems import problem_responses

_EXAMPLE: Final = """\
# HELP onnx_qat_jobs Unfinished jobs by their state
# TYPE onnx_qat_jobs gauge
onnx_qat_jobs{state="queued"} 3.0
onnx_qat_jobs{state="running"} 1.0
"""

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus' text format, or OpenMetrics where the client accepts it",
            "content": {
                "text/plain": {"schema": {"type": "string"}, "examples": {"metrics": {"value": _EXAMPLE}}}
            },
        },
        **problem_responses(ServiceErrorCode.UNAUTHORIZED, public=True),
    },
)
async def metrics(request: Request, services: InServices) -> Response:
    """What this process has counted and measured, and what is queued and running (the same at each API)."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    # In a thread that requests which wait for the database do not take away.
    content = await anyio.to_thread.run_sync(encode, services.metrics, limiter=anyio.CapacityLimiter(1))
    return Response(content, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
