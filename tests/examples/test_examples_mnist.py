"""examples/mnist.py: what the README claims of the main job."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import mnist
from examples.mnist import Result


@pytest.fixture(scope="module", params=mnist.BITS, ids=lambda bits: f"W{bits}A{bits}")
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder: Path = tmp_path_factory.mktemp("mnist")
    return mnist.run(folder, request.param)


def test_int8_top1_is_close_to_float(result: Result) -> None:
    allowed_loss = {8: 0.3, 4: 1.5}[result.bits]
    assert result.int8 >= result.float_top1 - allowed_loss - 1e-9


def test_training_helps_at_four_bits(result: Result) -> None:
    if result.bits == 4:
        assert result.int8 > result.int8_before_training
    else:  # nothing to win at 8 bits: training must not lose more than the post-training model does
        assert result.int8 >= min(result.int8_before_training, result.float_top1) - 0.3 - 1e-9


def test_fake_quantized_evaluation_and_int8_model_agree(result: Result) -> None:
    assert result.agreement >= 99.5


def test_the_report_shows_every_number() -> None:
    text = mnist.report([Result(4, 99.5, 90.25, 98.75, 98.5, 99.875)])
    assert text.splitlines()[-1].split() == ["W4A4", "99.50", "90.25", "98.75", "98.50", "99.88"]
