"""int32 biases: scale s_x * s_w, room in the accumulator, and float where the rules do not hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import parse

from rewriter.fake_quantize import is_fake_quantize
from rewriter.finalize.biases import LARGEST_BIAS, quantize_biases
from rewriter.insertion import insert
from rewriter.placement import place
from rewriter.quantization import QuantizerParameters
from rewriter.recipe import Recipe

INPUT_SCALE = 0.02


def quantized(text: str, arrays: dict[str, np.ndarray], weight_scale: float | np.ndarray) -> ir.Model:
    """The model of `text` after insertion; weights get `weight_scale`, activations `INPUT_SCALE`."""
    model = parse(text, arrays)
    plan = place(model, Recipe(per_channel=np.ndim(weight_scale) > 0))
    parameters = {}
    for quantizer in plan.quantizers:
        scale = np.float32(weight_scale if quantizer.kind == "weight" else INPUT_SCALE)
        zero_point = np.zeros(scale.shape, quantizer.range.dtype)
        parameters[quantizer.name] = QuantizerParameters(np.asarray(scale), zero_point, "test")
    insert(model, plan, parameters)
    return model


CONV = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) { y = Conv<pads = [1, 1, 1, 1]>(x, W, b) }"""
GEMM = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N, 3] x) => (float[N, 4] y) { y = Gemm<ATTRIBUTES>(x, W, b) }"""


def conv_arrays(bias: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"W": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "b": bias.astype(np.float32)}


def dequantized(model: ir.Model) -> np.ndarray:
    """What the bias input of the layer reads."""
    layer = next(node for node in model.graph if node.op_type in ("Conv", "Gemm"))
    node = layer.inputs[2].producer()
    assert node is not None
    assert node.op_type == "DequantizeLinear"
    integers, scale, zero_point = (value.const_value.numpy() for value in node.inputs)
    assert integers.dtype == np.int32
    assert not zero_point.any()
    return integers.astype(np.float64) * scale


@pytest.mark.parametrize("weight_scale", [0.01, np.array([0.01, 0.02, 0.5, 0.001])])
def test_one_step_of_the_bias_is_one_step_of_the_accumulator(weight_scale):
    bias = np.array([0.5, -1.25, 3.0, 0.0])
    model = quantized(CONV, conv_arrays(bias), weight_scale)
    assert quantize_biases(model) == []
    step = INPUT_SCALE * np.asarray(weight_scale)
    np.testing.assert_array_less(np.abs(dequantized(model) - bias), step / 2 * 1.0001)


def test_a_bias_that_does_not_fit_raises_the_weight_scale_of_its_channel_only():
    bias = np.array([0.5, 1000.0, -0.25, 0.0])
    scales = np.array([0.01, 1e-6, 0.01, 0.01], np.float32)
    model = quantized(CONV, conv_arrays(bias), scales)
    raised = quantize_biases(model)
    assert [(change.scale, change.channels) for change in raised] == [("W_scale", 1)]
    quantizer = next(n for n in model.graph if is_fake_quantize(n) and n.inputs[0].name == "W")
    changed = quantizer.inputs[1].const_value.numpy()
    np.testing.assert_array_equal(changed[[0, 2, 3]], scales[[0, 2, 3]])
    np.testing.assert_allclose(changed[1], 1000.0 / (INPUT_SCALE * LARGEST_BIAS), rtol=1e-6)
    np.testing.assert_allclose(dequantized(model)[1], 1000.0, rtol=1e-6)


@pytest.mark.parametrize("attributes", ["alpha = 0.5", "beta = 2.0"])
def test_the_bias_of_a_scaled_gemm_stays_float(attributes):
    arrays = {"W": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}
    model = quantized(GEMM.replace("ATTRIBUTES", attributes), arrays, 0.01)
    assert quantize_biases(model) == []
    assert next(n for n in model.graph if n.op_type == "Gemm").inputs[2].name == "b"


def test_layers_that_share_a_bias_get_one_each():
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N, 3] x) => (float[N, 3] y) {
        h = Gemm(x, W, b)
        y = Gemm(h, V, b)
    }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((3, 3)).astype(np.float32) for name in ("W", "V")}
    model = quantized(text, {**arrays, "b": np.ones(3, np.float32)}, 0.01)
    quantize_biases(model)
    biases = {n.inputs[2].name for n in model.graph if n.op_type == "Gemm"}
    assert len(biases) == 2
    assert "b" not in biases
