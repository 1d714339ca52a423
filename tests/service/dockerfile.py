"""What the Dockerfile says about the processes in the image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

TEXT: Final = (Path(__file__).parents[2] / "Dockerfile").read_text().replace("\\\n", "")

ENVIRONMENT: Final = dict(re.findall(r"\b(ONNX_QAT_\w+)=(\S+)", TEXT))
"""Settings for every process in the image."""

COMMAND: Final[list[str]] = json.loads(re.findall(r"^CMD (\[.*\])$", TEXT, re.MULTILINE)[-1])
CHECK: Final[list[str]] = json.loads(re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", TEXT, re.MULTILINE)[0])
"""The command of the health check."""

USER: Final[str] = re.findall(r"^USER (\S+)$", TEXT, re.MULTILINE)[-1]
