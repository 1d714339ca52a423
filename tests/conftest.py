"""Real models and data for every test, and how property tests run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from examples.digits import Digits, load_digits
from examples.models import model_path

# A machine under load must not fail a test for being slow, and a red CI run must be repeatable.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance",
        metavar="FILE",
        type=Path,
        default=Path(__file__).parent / "rewriter/conformance/tf_contrib_quantize.json",
        help="numbers that TensorFlow 1.15.5's tf.contrib.quantize produced, which our graphs reproduce",
    )


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """`real_model(name)`: path of a pinned model of examples/models.py, downloaded the first time."""
    return model_path


@pytest.fixture(scope="session")
def digits() -> Digits:
    return load_digits()
