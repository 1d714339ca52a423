"""SECURITY.md names tests and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

from service.settings import Settings

REPOSITORY = Path(__file__).parents[1]
SECURITY = (REPOSITORY / "SECURITY.md").read_text()


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", SECURITY)
    assert len(named) > 10
    for path in named:
        assert "def test_" in (REPOSITORY / path).read_text()


def test_every_section_names_its_tests_but_the_first_and_the_last() -> None:
    first, *sections, last = SECURITY.split("\n## ")[1:]
    assert first.startswith("What is to be protected")
    assert last.startswith("What is not defended")
    for section in sections:
        assert "\nTests: `tests/" in section, section.partition("\n")[0]


def test_the_settings_that_it_names_are_there() -> None:
    for name in re.findall(r"`ONNX_QAT_(\w+)", SECURITY):
        assert name.lower() in Settings.model_fields
