"""The OpenAPI document is committed, current and complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from service import openapi
from service.errors import ServiceErrorCode
from service.openapi import DOCUMENT, main, render
from service.problems import STATUS

OPENAPI: dict[str, Any] = json.loads(render())
OPERATIONS = [
    (f"{method.upper()} {path}", operation)
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
]


def test_the_committed_document_is_the_applications() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run: python -m service.openapi"


def test_the_document_is_written_where_one_asks_for_it(tmp_path: Path) -> None:
    assert main([str(tmp_path / "api.json")]) == 0
    assert (tmp_path / "api.json").read_text(encoding="utf-8") == render()


def test_an_installed_package_writes_nothing_into_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(openapi, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(openapi, "DOCUMENT", tmp_path / "openapi" / "openapi.json")
    assert main([]) == 2
    assert "name the file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_every_operation_documents_its_errors_as_problems(name: str, operation: dict[str, Any]) -> None:
    errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
    assert "500" in errors
    for answer in errors.values():
        assert list(answer["content"]) == ["application/problem+json"]
        assert re.match(r"Codes: `\w+`", answer["description"])


def test_every_reference_leads_somewhere() -> None:
    for reference in set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(OPENAPI))):
        assert reference in OPENAPI["components"]["schemas"]


def test_the_contract_is_there() -> None:
    assert {name for name, _ in OPERATIONS} >= {
        "POST /v1/models",
        "POST /v1/datasets",
        "POST /v1/checkpoints",
        "POST /v1/prepare",
        "POST /v1/jobs",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/events",
        "POST /v1/jobs/{job_id}/cancel",
        "GET /v1/jobs/{job_id}/bundle",
        "GET /v1/jobs/{job_id}/files/{name}",
        "GET /health/live",
        "GET /health/ready",
    }


def test_every_code_of_the_service_has_an_error_status() -> None:
    for code in ServiceErrorCode:
        assert STATUS[code] >= 400
