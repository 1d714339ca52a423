"""The OpenAPI document is committed, current and complete."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient
from service_helpers import assert_problem

from service import openapi
from service.errors import ServiceErrorCode
from service.openapi import DOCUMENT, main, render
from service.openapi_examples import CAUSES
from service.problems import STATUS
from service.webhooks.signing import key_of

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


@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_every_error_has_an_example_of_its_own(name: str, operation: dict[str, Any]) -> None:
    for status, answer in operation["responses"].items():
        if status < "400":
            continue
        content = answer["content"]["application/problem+json"]
        assert list(content["examples"]) == re.findall(r"`(\w+)`", answer["description"])
        for code, example in content["examples"].items():
            assert code in CAUSES, f"add an example of {code} to service/openapi_examples.py"
            problem = example["value"]
            assert (problem["code"], problem["status"]) == (code, int(status))
            validate(problem, content["schema"])


@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_every_parameter_request_and_answer_has_examples(name: str, operation: dict[str, Any]) -> None:
    """But for files, whose bytes cannot be shown."""
    for parameter in operation.get("parameters", []):
        assert "example" in parameter, f"{parameter['name']}: add one to service/openapi_examples.py"
        validate(parameter["example"], parameter["schema"])
    bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
    for body in bodies:
        for media_type, content in body.get("content", {}).items():
            schema = content.get("schema", {})
            if schema.get("format") == "binary":
                continue
            assert content.get("examples"), f"{media_type}: add examples to service/openapi_examples.py"
            for example in content["examples"].values():
                validate(example["value"], schema)


def test_only_streams_of_events_have_no_schema() -> None:
    """OpenAPI 3.1 has no way to describe them."""
    contents = [
        (media_type, content)
        for _, operation in OPERATIONS
        for body in (operation.get("requestBody", {}), *operation["responses"].values())
        for media_type, content in body.get("content", {}).items()
    ]
    assert {media_type for media_type, content in contents if "schema" not in content} == {
        "text/event-stream"
    }


@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_no_header_and_no_query_can_be_null(name: str, operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", []):
        assert {"type": "null"} not in parameter["schema"].get("anyOf", []), parameter["name"]


def test_forms_take_no_other_fields_and_no_empty_files() -> None:
    forms = [
        operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        for _, operation in OPERATIONS
        if "multipart/form-data" in operation.get("requestBody", {}).get("content", {})
    ]
    assert len(forms) == 4
    for form in forms:
        assert form["additionalProperties"] is False
        files = [field.get("items", field) for field in form["properties"].values() if "$ref" not in field]
        assert files
        assert {(file["format"], file["minLength"]) for file in files} == {("binary", 1)}


def test_the_document_offers_only_what_is_available() -> None:
    submitted = OPENAPI["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert sorted(submitted["discriminator"]["mapping"]) == ["finalize", "prepare"]


@pytest.mark.parametrize("length", [*range(20, 30), *range(60, 70)])
def test_the_pattern_of_webhook_secrets_is_what_the_service_takes(length: int) -> None:
    secret = "whsec_" + base64.b64encode(bytes(length)).decode()
    pattern = OPENAPI["components"]["schemas"]["Webhook"]["properties"]["secret"]["anyOf"][0]["pattern"]
    with contextlib.nullcontext() if 24 <= length <= 64 else pytest.raises(ValueError, match="whsec_"):
        key_of(secret)
    assert bool(re.search(pattern, secret)) == (24 <= length <= 64)


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Against a schema that may refer to the document's others."""
    whole = {**schema, "components": OPENAPI["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def test_an_example_that_does_not_fit_its_schema_is_found() -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate({"id": "x"}, {"$ref": "#/components/schemas/Upload"})


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


def test_a_path_that_the_document_lacks_is_not_found(client: TestClient) -> None:
    """Not redirected to one that it has: a client with a wrong path is to learn of it."""
    for path in ("/v1/jobs/", "/v1/models/", "/health/ready/"):
        assert_problem(client.get(path, follow_redirects=False), 404, "not_found")
