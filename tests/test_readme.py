"""README.md says what the code does, where a machine can check it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rewriter.recipe import Recipe

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_ci_runs_the_test_command() -> None:
    command = (REPOSITORY / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith(" -m pytest -n 2")
    assert command in README.splitlines()


@pytest.mark.parametrize("field", Recipe.model_fields)
def test_recipe_table_gives_every_field_and_its_default(field: str) -> None:
    defaults = Recipe().model_dump(mode="json")
    defaults["calibration"].pop("percentile")  # of use to one method only
    assert f"| `{field}` | `{json.dumps(defaults[field])}` |" in README


def test_recipe_table_gives_no_other_field() -> None:
    table = README[README.index("## Recipe") : README.index("## HTTP API")]
    fields = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert fields == list(Recipe.model_fields)


def test_curl_follows_a_download_to_the_store_and_saves_no_error() -> None:
    saving = [line for line in README.splitlines() if re.search(r"\bcurl .* -[oO]\b", line)]
    assert len(saving) == 2
    for line in saving:
        assert "curl -fsSL " in line
