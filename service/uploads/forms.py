"""Forms and files, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Final

BINARY: Final = {"type": "string", "format": "binary"}
UPLOADED: Final = {**BINARY, "minLength": 1}
"""A file in a request; an empty one is refused."""
EXTERNAL_DATA: Final = {
    "type": "array",
    "items": UPLOADED,
    "description": "files of the model's external data; the file names are those the model refers to",
}


def form(fields: dict[str, Any], *, required: str) -> dict[str, Any]:
    """OpenAPI for a form. A field that is not known is an error, so that none is misspelt unnoticed."""
    return {"type": "object", "properties": fields, "required": [required], "additionalProperties": False}
