"""Conditional requests by entity tags: RFC 9110, sections 8.8.3 and 13.1."""

from __future__ import annotations

from starlette.datastructures import Headers


def is_known(headers: Headers, etag: str) -> bool:
    """Whether If-None-Match names the tag, for GET and HEAD: compared weakly."""
    tags = _listed(headers, "if-none-match")
    return "*" in tags or etag in {tag.removeprefix("W/") for tag in tags}


def is_unwanted(headers: Headers, etag: str) -> bool:
    """Whether If-Match is there and does not name the tag, which is a strong one."""
    tags = _listed(headers, "if-match")
    return "if-match" in headers and not tags & {"*", etag}


def _listed(headers: Headers, name: str) -> set[str]:
    return {tag.strip() for line in headers.getlist(name) for tag in line.split(",")}
