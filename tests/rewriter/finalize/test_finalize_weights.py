"""Fake-quantized weights become integers: the same values, stored once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_text import parse

from rewriter.finalize.weights import quantize_weights
from rewriter.insertion import insert
from rewriter.lowering import lower
from rewriter.placement import place
from rewriter.quantization import QuantizerParameters, quantize
from rewriter.recipe import Recipe
from tests.rewriter.graphs import quantized

SHARED = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N, 4] x) => (float[N, 4] y) {
        h = MatMul(x, W)
        y = MatMul(h, W)
    }"""


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_shared_weight_is_stored_once_as_the_integers_of_the_reference(bits, per_channel):
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    model = parse(SHARED, {"W": weight})
    plan = place(model, Recipe(weight_bits=bits, per_channel=per_channel))
    quantizer = next(q for q in plan.quantizers if q.kind == "weight")
    shape = (4,) if per_channel else ()
    scale = np.full(shape, 0.3, np.float32)
    parameters = {
        q.name: QuantizerParameters(np.float32(0.1).reshape(()), np.zeros((), q.range.dtype), "test")
        for q in plan.quantizers
    }
    parameters[quantizer.name] = QuantizerParameters(scale, np.zeros(shape, np.int8), "test")
    insert(model, plan, parameters)

    assert quantize_weights(model) == 1
    layers = [n for n in model.graph if n.op_type == "MatMul"]
    sources = {n.inputs[1].producer() for n in layers}
    assert len(sources) == 1
    integers = sources.pop().inputs[0].const_value.numpy()
    assert integers.dtype == np.int8
    axis = quantizer.axis
    expected = quantize(weight, scale, np.zeros(shape, np.int8), quantizer.range, axis)
    np.testing.assert_array_equal(integers, expected)
    assert np.abs(integers).max() <= quantizer.range.qmax
    assert "W" not in model.graph.initializers


@pytest.mark.parametrize("taken", ["W_quantized", "W_quantized_dequantized"])
def test_names_that_other_tensors_have_are_left_to_them(taken):
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    model = parse(SHARED.replace("h", taken), {"W": weight})
    quantized(model)
    quantize_weights(model)
    lower(model, saturation="between")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
