"""benchmarks/prepare.py: measures every operation in its own process and says when one failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prepare import OPERATIONS, Row, Run, report

REPOSITORY = Path(__file__).parents[2]


def test_one_repetition_measures_every_operation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.prepare", "ppocr2-cls", "--repetitions", "1"]
    subprocess.run([*command, "--json", str(tmp_path / "b.json")], cwd=REPOSITORY, check=True)
    document = json.loads((tmp_path / "b.json").read_text())
    assert [row["operation"] for row in document["rows"]] == list(OPERATIONS)
    for row in document["rows"]:
        (run,) = row["runs"]
        assert run["error"] is None
        assert run["seconds"] > 0
        assert run["peak_bytes"] >= run["imports_bytes"] > 0


def test_ratios_are_those_of_prepare_to_the_other_operation() -> None:
    rows = [
        Row("m", "load_save", (Run(1.0, 100 << 20, 1 << 20), Run(3.0, 100 << 20, 1 << 20))),
        Row("m", "prepare", (Run(5.0, 300 << 20, 1 << 20), Run(5.0, 300 << 20, 1 << 20))),
    ]
    line = report(rows).splitlines()[1]
    assert "2.50 x time, 3.00 x memory" in line
    assert "(1.00..3.00)" in line


@pytest.mark.parametrize("failing", ["load_save", "prepare"])
def test_a_failed_operation_is_a_row_with_its_reason(failing: str) -> None:
    good, bad = (Run(1.0, 1 << 20, 1 << 20),), (Run(1.0, 1 << 20, 1 << 20), Run(error="exit status 1: no"))
    rows = [Row("m", name, bad if name == failing else good) for name in ("load_save", "prepare")]
    text = report(rows)
    assert "failed: exit status 1: no" in text
    assert "x time" not in text
