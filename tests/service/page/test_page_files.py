"""The page over HTTP: its files, their headers, and nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from service_helpers import assert_problem

from rewriter import Recipe
from service.page.endpoints import ASSETS, INDEX, RECIPE_SCHEMA

REPOSITORY = Path(__file__).parents[3]
PATHS = ["/", "/jobs/0123456789abcdef0123456789abcdef", *(f"/page/{name}" for name in ASSETS)]


def test_every_file_is_served_with_a_strict_policy(client: TestClient) -> None:
    for path in PATHS:
        headers = client.get(path).headers
        rules = {
            name: sources
            for name, *sources in (rule.split() for rule in headers["content-security-policy"].split(";"))
        }
        assert rules["default-src"] == ["'none'"], path
        assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
        # Nothing inline, nothing evaluated, nothing of another origin.
        assert {source for sources in rules.values() for source in sources} <= {
            "'none'",
            "'self'",
            "'script'",
        }
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-opener-policy"] == "same-origin"


def test_the_page_is_html_at_the_root_and_at_a_jobs_address(client: TestClient) -> None:
    root = client.get("/")
    assert root.headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/jobs/0123456789abcdef0123456789abcdef").content == root.content


@pytest.mark.parametrize("name", [name for name in ASSETS if name != RECIPE_SCHEMA])
def test_no_file_names_another_server(name: str) -> None:
    text = ASSETS[name].content.decode()
    # The name space of SVG is no address to load from.
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()


def test_no_markup_or_code_is_made_of_strings_or_written_inline() -> None:
    scripts = "".join(asset.content.decode() for name, asset in ASSETS.items() if name.endswith(".js"))
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert unsafe not in scripts
    html = ASSETS[INDEX].content.decode()
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", html)


def test_every_file_that_is_loaded_is_there(client: TestClient) -> None:
    html = ASSETS[INDEX].content.decode()
    loaded = set(re.findall(r'(?:href|src)="(/page/[^"]+)"', html))
    for name, asset in ASSETS.items():
        if name.endswith(".js"):
            text = asset.content.decode()
            loaded |= {f"/page/{file}" for file in re.findall(r'from "\./([^"]+)"', text)}
            loaded |= set(re.findall(r'"(/page/[^"]+)"', text))
    assert len(loaded) > 5
    for path in loaded:
        assert client.get(path).status_code == 200, path
    # And no file is left over.
    assert {f"/page/{name}" for name in ASSETS} - loaded == {f"/page/{INDEX}"}


def test_scripts_and_styles_have_types_that_browsers_take(client: TestClient) -> None:
    assert client.get("/page/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/page/style.css").headers["content-type"] == "text/css; charset=utf-8"
    assert client.get("/page/icon.svg").headers["content-type"] == "image/svg+xml"


def test_the_form_is_made_of_the_recipes_own_schema(client: TestClient) -> None:
    assert client.get("/page/recipe.schema.json").json() == Recipe.model_json_schema()


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_file_that_is_not_there_is_a_problem(client: TestClient) -> None:
    assert_problem(client.get("/page/nothing.js"), 404, "not_found")
    assert client.get("/page/..%2fendpoints.py").status_code == 404


def test_the_wheel_has_every_file_of_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part in ("service", "rewriter"):
        shutil.copytree(REPOSITORY / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / file, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {f"service/page/static/{name}" for name in ASSETS if name != RECIPE_SCHEMA} <= set(files)
