"""`python -m service.openapi` writes the application's OpenAPI document to openapi/openapi.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from service.app import create_app
from service.settings import Settings

DOCUMENT: Final = Path(__file__).parent.parent / "openapi" / "openapi.json"


def render() -> str:
    """The document as it is committed."""
    return json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render(), encoding="utf-8")
