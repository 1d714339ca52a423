"""`python -m service.openapi [FILE]` writes the application's OpenAPI document.

Without FILE it is the committed document, openapi/openapi.json of the source checkout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from service.app import create_app
from service.settings import Settings

_CHECKOUT: Final = Path(__file__).parent.parent
DOCUMENT: Final = _CHECKOUT / "openapi" / "openapi.json"


def render() -> str:
    """The document as it is committed."""
    return json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the document; the exit status."""
    if not arguments and not (_CHECKOUT / "pyproject.toml").is_file():
        print("error: this is no source checkout, name the file to write", file=sys.stderr)
        return 2
    path = Path(arguments[0]) if arguments else DOCUMENT
    path.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
