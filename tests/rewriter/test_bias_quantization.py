"""Biases are rounded in training as int32 rounds them, where integer kernels can take them."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.bias_quantization import insert_bias_quantizers
from rewriter.fake_quantize import is_fake_quantize_bias, read_bias
from rewriter.gradients import differentiate
from rewriter.lowering import lower
from rewriter.normalize.quantize_pairs import RaiseQuantizePairs
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph, listing, quantized, run

CONV = "g (float[N,3,6,6] x) => (y) <float[4,3,3,3] w, float[4] b> { y = Conv(x, w, b) }"


def rounded_biases(model) -> list[str]:
    return [read_bias(node).bias.name for node in model.graph if is_fake_quantize_bias(node)]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("saturation", ["before", "between"])
def test_a_bias_is_rounded_to_steps_of_the_accumulator(per_channel, saturation):
    model = graph(CONV)
    quantized(model, Recipe(per_channel=per_channel, weight_bits=4, activation_bits=4))
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    lower(model, saturation=saturation)
    # With x = 0 the quantized output shows the bias alone; look at it before the output quantizer.
    conv = next(node for node in model.graph if node.op_type == "Conv")
    model.graph.outputs[:] = [conv.inputs[2]]
    actual = run(model, x=np.zeros((1, 3, 6, 6), np.float32))[0]
    step = arrays["x_scale"].astype(np.float64) * arrays["w_scale"]
    np.testing.assert_allclose(actual, np.rint(arrays["b"] / step) * step, rtol=1e-6)
    assert np.abs(actual - arrays["b"]).max() > 0


@pytest.mark.parametrize(
    ("text", "biases"),
    [
        (CONV, ["b"]),
        ("g (float[N,4] x) => (y) <float[4,3] w, float[3] b> { y = Gemm(x, w, b) }", ["b"]),
        ("g (float[N,4] x) => (y) <float[4,3] w, float[1,3] b> { y = Gemm(x, w, b) }", ["b"]),
        ("g (float[N,4] x) => (y) <float[3,4] w, float[3] b> { y = Gemm<transB=1>(x, w, b) }", ["b"]),
        ("g (float[N,4] x) => (y) <float[4,3] w, float[3] b> { y = Gemm<beta=2.0>(x, w, b) }", []),
        ("g (float[N,4] x) => (y) <float[4,3] w, float[3] b> { y = Gemm<alpha=2.0>(x, w, b) }", []),
        ("g (float[2,4] x) => (y) <float[4,3] w, float[2,1] b> { y = Gemm(x, w, b) }", []),
        ("g (float[N,4] x) => (y) <float[4,3] w, float b> { y = Gemm(x, w, b) }", []),
        ("g (float[N,4] x) => (y) <float[4,3] w> { y = Gemm(x, w) }", []),
        (
            "g (float[N,4] x) => (y) <float[4,4] w, float[4] b> { t = Gemm(x, w, b) y = Gemm(t, w, b) }",
            ["b", "b"],
        ),
        (
            "g (float[N,2,6,6] x) => (y) <float[2,3,3,3] w, float[3] b> { y = ConvTranspose(x, w, b) }",
            ["b"],
        ),
        (
            "g (float[N,2,6,6] x) => (y) <float[2,3,3,3] w, float[6] b> "
            "{ y = ConvTranspose<group=2>(x, w, b) }",
            ["b"],  # one scale for the whole weight
        ),
    ],
)
def test_which_biases_are_rounded(text, biases):
    model = graph(text)
    quantized(model)
    assert rounded_biases(model) == biases


def test_a_layer_that_is_not_quantized_keeps_its_bias():
    model = graph(
        "g (float[N,4] x) => (y) <float[4,4] w, float[4] b, float[4,4] v> "
        "{ t = Gemm(x, w, b) y = MatMul(t, v) }"
    )
    quantized(model, Recipe.parse({"overrides": [{"match": "Gemm", "quantize": False}]}))
    assert rounded_biases(model) == []


def test_doing_it_again_changes_nothing():
    model = graph(CONV)
    quantized(model)
    before = listing(model)
    insert_bias_quantizers(model)
    assert listing(model) == before


def test_what_was_lowered_is_raised():
    model = graph(CONV)
    quantized(model)
    lowered = model.clone()
    lower(lowered, saturation="before")
    RaiseQuantizePairs()(lowered)
    assert rounded_biases(lowered) == ["b"]
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    lower(model, saturation="between")
    lower(lowered, saturation="between")
    np.testing.assert_array_equal(run(lowered, x=x)[0], run(model, x=x)[0])


def test_the_gradient_of_a_bias_passes_straight_through():
    model = graph(
        "g (float[5,4] x) => (loss) <float[4,3] w, float[3] b> "
        "{ y = Gemm(x, w, b) loss = ReduceSum<keepdims=0>(y) }"
    )
    quantized(model)
    gradients = differentiate(
        model.graph,
        model.graph.outputs[0],
        [model.graph.initializers["b"], model.graph.initializers["x_scale"]],
    )
    model.graph.outputs[:] = [gradients[model.graph.initializers["b"]]]
    lower(model, saturation="between")
    np.testing.assert_array_equal(run(model, x=np.zeros((5, 4), np.float32))[0], [5.0, 5.0, 5.0])
