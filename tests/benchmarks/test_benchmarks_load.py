"""benchmarks/load.py in short: what must hold at any speed of the machine, and what counts as passed."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path

import onnx
import pytest

from benchmarks.load import ALLOWED_GROWTH, ALLOWED_P95, Outcome, growth, measure
from benchmarks.service_processes import Models

GOOD = Outcome(
    uploads_per_second=1,
    jobs_per_second=1,
    lost=0,
    twice=0,
    reads=[0.01] * 95 + [0.1] * 5,
    peak_memory=100,
    memory_growth=0,
)


def test_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    arguments = argparse.Namespace(uploads=20, jobs=8, readers=20, pause=0.2, workers=2, apart=False)
    outcome = measure(arguments, tmp_path)
    assert (outcome.lost, outcome.twice) == (0, 0)
    assert len(outcome.reads) > 20


@pytest.mark.parametrize(
    "changes",
    [
        {"lost": 1},
        {"twice": 1},
        {"reads": [0.01] * 94 + [2 * ALLOWED_P95] * 6},
        {"memory_growth": 2 * ALLOWED_GROWTH},
    ],
)
def test_each_measure_can_fail(changes: dict[str, object]) -> None:
    assert GOOD.passed
    assert not dataclasses.replace(GOOD, **changes).passed


def test_growth_is_seen_after_the_first_quarter_of_the_time() -> None:
    assert growth([100.0] * 500) == 0
    assert growth([0.0] * 125 + [100.0] * 375) == 0  # what is reached at first is no growth
    assert growth([float(sample) for sample in range(500)]) == 250
    assert growth([100.0, 100.0, 100.0, 140.0]) == 40


def test_models_are_valid_and_all_different() -> None:
    models = Models(20_000)
    assert len({hashlib.sha256(models[number]).digest() for number in range(100)}) == 100
    assert 10_000 < len(models[0]) < 30_000
    onnx.checker.check_model(onnx.load_from_string(models[7]))
