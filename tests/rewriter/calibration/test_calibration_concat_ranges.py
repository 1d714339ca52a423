"""A range shared through a Concat of inputs with very different ranges comes with a warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rewriter.calibration import calibrate
from rewriter.placement import place
from rewriter.quantization import QuantizerParameters
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph


def parameters(
    factor: float, path: Path | None, body: str = "j = Concat<axis=1>(r, s)"
) -> QuantizerParameters:
    """Of the quantizer of `j`; `s` is `factor` times as wide as `r`."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model = graph(
        "g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w, float[4,3,3,3] w2, float[2,8,1,1] v> "
        f"{{ a = Conv(x, w) r = Relu(a) b = Conv(x, w2) s = Relu(b) {body} y = Conv(j, v) }}",
        w=weight,
        w2=(weight * factor).astype(np.float32),
    )
    plan = place(model, Recipe())
    (owner,) = (q.name for q in plan.quantizers if any(tensor.name == "j" for tensor in q.tensors))
    return calibrate(model, plan, Recipe(), path)[owner]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32))
    return path


@pytest.mark.parametrize(
    ("factor", "wide", "narrow", "ratio"), [(20, "s", "r", "20"), (0.05, "r", "s", "20")]
)
def test_the_warning_names_the_concat_and_its_widest_and_narrowest_input(
    samples: Path, factor: float, wide: str, narrow: str, ratio: str
) -> None:
    assert parameters(factor, samples).warning == (
        f"The inputs of the Concat that makes 'j' share one range, but {wide!r} is {ratio} times as wide as "
        f"{narrow!r}, which keeps few of the integers."
    )


@pytest.mark.parametrize("factor", [0.15, 1, 9])
def test_similar_ranges_are_no_warning(samples: Path, factor: float) -> None:
    assert parameters(factor, samples).warning is None


def test_an_add_of_different_ranges_is_no_warning(samples: Path) -> None:
    assert parameters(20, samples, "k = Add(r, s) j = Concat<axis=1>(k, k)").warning is None


def test_random_inputs_are_no_ground_for_a_warning() -> None:
    found = parameters(20, None)
    assert (found.initialized, found.warning) == ("uncalibrated:random_inputs", None)


def test_the_range_is_that_of_all_inputs(samples: Path) -> None:
    low, high = (float(parameters(factor, samples).scale) for factor in (1, 20))
    assert high == pytest.approx(20 * low, rel=0.05)
