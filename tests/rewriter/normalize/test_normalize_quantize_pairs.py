"""Q/DQ pairs become FakeQuantize nodes that compute the same, and placement adds no second layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.insertion import insert
from rewriter.load import load, save
from rewriter.lowering import Saturation, lower
from rewriter.normalize import normalize
from rewriter.normalize.quantize_pairs import RaiseQuantizePairs
from rewriter.operators import weight_operand
from rewriter.placement import place
from rewriter.quantization import IntegerRange
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph, listing, quantized, ranges_of, run

S, Z = np.array(0.1, np.float32), np.array(3, np.uint8)
PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"


def raised(model: ir.Model) -> list[FakeQuantize]:
    result = RaiseQuantizePairs()(model)
    assert result.modified
    return [read(node) for node in model.graph if is_fake_quantize(node)]


def test_a_pair_keeps_its_scale() -> None:
    model = graph(f"g (float[N,4] x) => (y) <float s, uint8 z> {{ {PAIR} y = Relu(d) }}", s=S, z=Z)
    (quantizer,) = raised(model)
    assert listing(model) == "x_fake_quantized = FQ(x by x_scale)\ny = Relu(x_fake_quantized)"
    assert (quantizer.range, quantizer.axis, quantizer.on_grid) == (IntegerRange(0, 255), None, False)
    assert quantizer.scale.const_value.numpy() == S
    assert quantizer.zero_point.const_value.numpy() == Z


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z2)",
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s2, z)",
        "q, t, p = DynamicQuantizeLinear(x) d = DequantizeLinear(q, t, p)",
        "q = QuantizeLinear(x, negative, z) d = DequantizeLinear(q, negative, z)",
        "q = QuantizeLinear(x, s, z) r = Reshape(q, shape) d = DequantizeLinear(r, s, z)",
    ],
)
def test_what_is_not_a_constant_pair_is_left(body: str) -> None:
    model = graph(
        "g (float[N,4] x) => (y) <float s, float s2, float negative, uint8 z, uint8 z2, int64[2] shape> "
        f"{{ {body} y = Relu(d) }}",
        s=S, s2=S * 2, negative=-S, z=Z, z2=Z + 1, shape=np.array([-1, 2]),
    )  # fmt: skip
    before = listing(model)
    assert not RaiseQuantizePairs()(model).modified
    assert listing(model) == before


def test_a_graph_output_keeps_its_name() -> None:
    model = graph(
        f"g (float[N,4] x) => (d, e) <float s, uint8 z> {{ {PAIR} e = DequantizeLinear(q, s, z) }}",
        s=S,
        z=Z,
    )
    assert len(raised(model)) == 2
    assert [output.name for output in model.graph.outputs] == ["d", "e"]


def test_an_integer_weight_becomes_a_float_one() -> None:
    integers = np.arange(-6, 6).reshape(4, 3).astype(np.int8)
    scale = np.array([0.1, 0.2, 0.3], np.float32)
    model = graph(
        "g (float[N,4] x) => (y) <int8[4,3] w, float[3] ws, int8[3] wz> "
        "{ d = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(x, d) }",
        w=integers,
        ws=scale,
        wz=np.zeros(3, np.int8),
    )
    (quantizer,) = raised(model)
    assert quantizer.range == IntegerRange(-127, 127)
    assert quantizer.axis == 1
    np.testing.assert_allclose(quantizer.x.const_value.numpy(), integers * scale, rtol=1e-7)
    assert "w" not in model.graph.initializers


def scales_of_one_element(attribute: str, weight: str, layer: str) -> FakeQuantize:
    model = graph(
        f"g (float[N,3,8,8] x) => (y) <int8{weight} w, float[1] ws, int8[1] wz> "
        f"{{ d = DequantizeLinear{attribute}(w, ws, wz) y = {layer} }}",
        w=np.ones([int(d) for d in weight[1:-1].split(",")], np.int8),
        ws=np.array([0.1], np.float32),
        wz=np.zeros(1, np.int8),
    )
    (quantizer,) = raised(model)
    return quantizer


def test_one_scale_is_that_of_the_one_channel_if_the_node_names_its_axis() -> None:
    quantizer = scales_of_one_element("<axis=0>", "[1,3,3,3]", "Conv(x, d)")
    assert (quantizer.axis, quantizer.scale.shape) == (0, (1,))


@pytest.mark.parametrize(("attribute", "weight"), [("<axis=0>", "[3,1,3,3]"), ("", "[3,1,3,3]")])
def test_one_scale_of_several_channels_or_of_no_axis_is_per_tensor(attribute: str, weight: str) -> None:
    quantizer = scales_of_one_element(attribute, weight, "Conv<group=3>(x, d)")
    assert (quantizer.axis, quantizer.scale.shape) == (None, ())


def test_minus_128_keeps_the_full_range() -> None:
    model = graph(
        "g (float[N,4] x) => (y) <int8[4,3] w, float ws> { d = DequantizeLinear(w, ws) y = MatMul(x, d) }",
        w=np.full((4, 3), -128, np.int8),
        ws=S,
    )
    assert raised(model)[0].range == IntegerRange(-128, 127)


def test_an_int32_bias_becomes_a_float_initializer() -> None:
    model = graph(
        "g (float[N,3,8,8] x) => (y) <float[4,3,1,1] w, int32[4] b, float[4] bs> "
        "{ d = DequantizeLinear<axis=0>(b, bs) y = Conv(x, w, d) }",
        b=np.array([1, 2, 3, -4], np.int32),
        bs=np.array([1, 0.5, 2, 1], np.float32),
    )
    assert raised(model) == []
    np.testing.assert_array_equal(model.graph[0].inputs[2].const_value.numpy(), [1, 1, 6, -4])


def test_pairs_that_read_one_scale_share_a_quantizer_and_equal_scales_do_not() -> None:
    model = graph(
        "g (float[N,4] a, float[N,4] b, float[N,4] c) => (x, y, u) <float s, float s2, uint8 z> { "
        "q1 = QuantizeLinear(a, s, z) d1 = DequantizeLinear(q1, s, z) x = Relu(d1) "
        "q2 = QuantizeLinear(b, s, z) d2 = DequantizeLinear(q2, s, z) y = Relu(d2) "
        "q3 = QuantizeLinear(c, s2, z) d3 = DequantizeLinear(q3, s2, z) u = Relu(d3) }",
        s=S,
        s2=S,
        z=Z,
    )
    first, second, third = raised(model)
    assert first.scale is second.scale
    assert third.scale is not first.scale


def test_a_relu6_that_does_not_end_on_the_grid_stays() -> None:
    model = graph(
        "g (float[N,4] x) => (y) <float s, uint8 z, float zero, float six> { c = Clip(x, zero, six) "
        "q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }",
        s=np.array(0.0237, np.float32),
        z=np.array(0, np.uint8),
        zero=np.float32(0),
        six=np.float32(6.01),
    )
    (quantizer,) = raised(model)
    assert quantizer.x.producer().op_type == "Clip"
    assert quantizer.range == IntegerRange(0, 255)


def facts(model: ir.Model) -> list[tuple[object, ...]]:
    found = [read(node) for node in model.graph if is_fake_quantize(node)]
    return sorted((q.scale.name, q.x.name, q.range.qmin, q.range.qmax, q.axis or 0, q.on_grid) for q in found)


RECIPES = [
    Recipe(),
    Recipe(symmetric=True, per_channel=False),
    Recipe(weight_bits=4, activation_bits=3),
    Recipe(weight_bits=2, activation_bits=4, symmetric=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["w8a8", "w8a8_symmetric", "w4a3", "w2a4_symmetric"])
@pytest.mark.parametrize("name", ["mnist-conv", "ppocr2-cls", "minilm-l3"])
def test_what_we_wrote_is_read_back(real_model: Callable[[str], Path], name: str, recipe: Recipe) -> None:
    model = load(real_model(name))
    normalize(model)
    fold_batch_norms(model)
    plan = quantized(model, recipe)
    lowered = model.clone()
    lower(lowered, saturation="before")
    RaiseQuantizePairs()(lowered)
    assert facts(lowered) == facts(model)
    again = place(lowered, recipe)
    assert all(one.existing for one in again.quantizers)
    assert {(one.name, one.bits, one.axis) for one in again.quantizers} == {
        (one.name, one.bits, one.axis) for one in plan.quantizers
    }
    before = listing(lowered)
    insert(lowered, again, {})
    assert listing(lowered) == before


ONE_CHANNEL = {
    "conv": "g (float[N,3,8,8] x) => (y) <float[1,3,3,3] w, float[1] b> { y = Conv(x, w, b) }",
    "depthwise": "g (float[N,1,8,8] x) => (y) <float[1,1,3,3] w, float[1] b> { y = Conv(x, w, b) }",
    "conv_transpose": "g (float[N,3,8,8] x) => (y) <float[3,1,2,2] w> { y = ConvTranspose(x, w) }",
    "gemm": "g (float[N,6] x) => (y) <float[6,1] w, float[1] b> { y = Gemm(x, w, b) }",
    "gemm_transposed": "g (float[N,6] x) => (y) <float[1,6] w> { y = Gemm<transB=1>(x, w) }",
    "matmul": "g (float[N,6] x) => (y) <float[6,1] w> { y = MatMul(x, w) }",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=["w8a8", "w8a8_symmetric", "w4a3", "w2a4_symmetric"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ONE_CHANNEL)
def test_a_layer_with_one_output_channel_comes_back_from_a_file(
    name: str, per_channel: bool, recipe: Recipe, tmp_path: Path
) -> None:
    model = graph(ONE_CHANNEL[name])
    operand = weight_operand(model.graph[0])
    assert operand is not None
    axis = operand.axis if per_channel else None
    # Placement may give the one channel a scale of shape []; other writers and older bundles have [1].
    plan = place(model, recipe)
    quantizers = tuple(
        dataclasses.replace(one, axis=axis) if one.kind == "weight" else one for one in plan.quantizers
    )
    plan = dataclasses.replace(plan, quantizers=quantizers)
    insert(model, plan, ranges_of(model, plan))
    before, constants = facts(model), shapes_of_initializers(model)
    assert constants["w_scale"] == (() if axis is None else (1,))
    lower(model, saturation="before")
    save(model, tmp_path / "lowered.onnx")
    again = load(tmp_path / "lowered.onnx")
    RaiseQuantizePairs()(again)
    RemoveUnusedNodesPass()(again)
    assert facts(again) == before
    assert shapes_of_initializers(again) == constants


def shapes_of_initializers(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape.numpy()) for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("form", ["before", "between"])
@pytest.mark.parametrize("recipe", RECIPES, ids=["w8a8", "w8a8_symmetric", "w4a3", "w2a4_symmetric"])
def test_raising_and_lowering_again_computes_the_same(recipe: Recipe, form: Saturation) -> None:
    model = graph(
        "g (float[N,3,8,8] x) => (y, s) <float[4,3,3,3] w, float[4] b, float[4,4,1,1] v> "
        "{ a = Conv(x, w, b) r = Relu(a) p = MaxPool<kernel_shape=[2,2]>(r) c = Conv(p, v) s = Add(c, p) "
        "y = GlobalAveragePool(s) }"
    )
    quantized(model, recipe)
    lower(model, saturation=form)
    again = model.clone()
    assert len(raised(again)) == 8
    lower(again, saturation="between")
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for expected, actual in zip(run(model, x=x), run(again, x=x), strict=True):
        np.testing.assert_array_equal(actual, expected)
