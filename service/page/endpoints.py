"""The page for people, at `/`: static files that use the HTTP API like any other client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final

from fastapi import APIRouter, Request, Response

from rewriter import Recipe
from service import entity_tags
from service.errors import ServiceError, ServiceErrorCode

# The page loads nothing from elsewhere, runs no inline script and turns no string into markup.
SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_MEDIA_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
}
INDEX: Final = "index.html"
# What the recipe's form is made of.
RECIPE_SCHEMA: Final = "recipe.schema.json"

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Asset:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> Asset:
        media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        return cls(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _load() -> dict[str, Asset]:
    files = {
        path.name: path.read_bytes() for path in resources.files("service.page").joinpath("static").iterdir()
    }
    files[RECIPE_SCHEMA] = json.dumps(Recipe.model_json_schema()).encode()
    return {name: Asset.of(name, content) for name, content in files.items()}


# All of it is smaller than one model.
ASSETS: Final[Mapping[str, Asset]] = _load()


@router.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/jobs/{job_id}", methods=["GET", "HEAD"])
def page(request: Request) -> Response:
    """The page; at a job's address it shows that job."""
    return _answer(request, ASSETS[INDEX])


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def asset(name: str, request: Request) -> Response:
    """A file that the page loads."""
    if name not in ASSETS:
        raise ServiceError(ServiceErrorCode.NOT_FOUND, "The page has no such file.", file=name)
    return _answer(request, ASSETS[name])


def _answer(request: Request, asset: Asset) -> Response:
    # Asked for again each time, and sent only when it changed: an updated service shows its own page.
    headers = {**SECURITY_HEADERS, "ETag": asset.etag, "Cache-Control": "no-cache"}
    if entity_tags.is_known(request.headers, asset.etag):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
