"""compose.yaml as Compose reads it: merged, and with values for its variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

REPOSITORY: Final = Path(__file__).parents[2]
TEXT: Final = (REPOSITORY / "compose.yaml").read_text()

_VARIABLE: Final = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")

PASSED: Final = set(re.findall(r"^  (ONNX_QAT_\w+):$", TEXT, re.MULTILINE))
"""What containers get if the user has set it."""
VARIABLES: Final = {name for _, name, _ in _VARIABLE.findall(TEXT) if name} | PASSED
"""What a user can set in .env or in the environment."""

SECRETS: Final = {
    name: f"{name.replace('_', '').lower()}0123456789"
    for name in ("QAT_POSTGRES_PASSWORD", "QAT_REDIS_PASSWORD", "QAT_S3_ACCESS_KEY", "QAT_S3_SECRET_KEY")
}
"""The variables of the scaled form that have no default, with values."""


def load(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file, with these values for its variables.

    Compose's own rules: https://github.com/compose-spec/compose-spec/blob/main/12-interpolation.md
    """

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        return variables.get(match["name"]) or match["default"] or ""

    def interpolated(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: interpolated(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [interpolated(inner) for inner in part]
        return _VARIABLE.sub(value, part) if isinstance(part, str) else part

    document: dict[str, Any] = interpolated(yaml.safe_load(TEXT))
    return document


def services(variables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The services by name."""
    found: dict[str, dict[str, Any]] = load(variables)["services"]
    for service in found.values():
        # A variable without a value is passed on if it is set.
        told = {name: variables.get(name, value) for name, value in service.get("environment", {}).items()}
        service["environment"] = {name: value for name, value in told.items() if value is not None}
    return found


def check_command(service: dict[str, Any]) -> list[str]:
    """The command of a service's health check."""
    kind, *arguments = service["healthcheck"]["test"]
    return ["sh", "-c", *arguments] if kind == "CMD-SHELL" else arguments
