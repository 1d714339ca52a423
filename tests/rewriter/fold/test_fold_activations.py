"""A Relu or Clip before a quantizer becomes part of its integer range, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.fold.activations import absorb_activations
from rewriter.lowering import lower
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph, listing, quantized, run

CONV = "g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w, float low, float high>"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    ("activation", "bounds"),
    [
        ("Relu(u)", (0, 0)),
        ("Clip(u, low, high)", (0.0, 0.9)),
        ("Clip(u, low, high)", (-0.31, 2.5)),
        ("Clip(u, low)", (0.0, 0.0)),
        ("Clip(u, , high)", (0.0, 1.0)),
        ("Clip(u, low, high)", (-100.0, 100.0)),
    ],
)
def test_computes_the_same(activation: str, bounds: tuple[float, float], bits: int, symmetric: bool) -> None:
    low, high = np.float32(bounds[0]), np.float32(bounds[1])
    model = graph(f"{CONV} {{ u = Conv(x, w) y = {activation} }}", low=low, high=high)
    quantized(model, Recipe(activation_bits=bits, symmetric=symmetric))
    folded = model.clone()
    assert absorb_activations(folded) == 1
    assert [line.split(" = ")[1][:4] for line in listing(folded).splitlines()].count("Conv") == 1
    for each in (model, folded):
        lower(each, saturation="between")
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(folded, x=x)[0], run(model, x=x)[0])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("u = Conv(x, w) y = Clip(u, high, low)", "no range is left"),
        ("u = Conv(x, w) y = Sigmoid(u)", "not a bound"),
    ],
)
def test_left_alone(body: str, why: str) -> None:
    model = graph(f"{CONV} {{ {body} }}", low=np.float32(0), high=np.float32(1))
    quantized(model)
    before = listing(model)
    assert absorb_activations(model) == 0, why
    assert listing(model) == before


def test_an_activation_that_is_read_as_float_too_stays() -> None:
    model = graph(f"{CONV} {{ u = Conv(x, w) y = Relu(u) }}")
    quantized(model)
    relu = next(node for node in model.graph if node.op_type == "Relu")
    model.graph.outputs.append(relu.outputs[0])
    assert absorb_activations(model) == 0
