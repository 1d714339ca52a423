"""Operators of old and new opsets, written in opset 18: they compute what they computed."""

# ruff: noqa: E501  (one case a line)

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from normalize_helpers import model, node_of, normal, operators, proto, run
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from rewriter.errors import ErrorCode, QatError
from rewriter.normalize import normalize
from rewriter.normalize.opset import ConvertOpsetPass
from rewriter.normalize.opset_upgrades import UPGRADES
from rewriter.normalize.shapes import InferShapesPass


def converted(source: onnx.ModelProto) -> ir.Model:
    """In opset 18, and valid there."""
    result = ir.from_proto(source)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(result)
    InferShapesPass()(result)
    ConvertOpsetPass()(result)
    InferShapesPass()(result)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert result.opset_imports[""] == 18
    return result


X = normal(2, 3, 6, 6)
IMAGE = "g (float[2,3,6,6] x) => (float[] y)"

# opset, graph, inputs; the original runs in onnxruntime.
UPWARDS = {
    "clip_bounds": (10, "g (float[2,3] x) => (float[2,3] y) { y = Clip <min = -0.5, max = 0.25> (x) }", X[0, :2, 0, :3]),
    "clip_above": (7, "g (float[2,3] x) => (float[2,3] y) { y = Clip <max = 0.25> (x) }", X[0, :2, 0, :3]),
    "dropout_of_inference": (7, "g (float[2,3] x) => (float[2,3] y) { y = Dropout <ratio = 0.7> (x) }", X[0, :2, 0, :3]),
    "dropout_after_11": (11, "g (float[2,3] x) => (float[2,3] y) { y = Dropout <ratio = 0.7> (x) }", X[0, :2, 0, :3]),
    "softmax_over_the_last": (11, "g (float[2,6] x) => (float[2,6] y) { y = Softmax (x) }", X[:, 0, 0]),
    "softmax_over_several": (11, "g (float[2,3,6,6] x) => (float[2,3,6,6] y) { y = Softmax <axis = 1> (x) }", X),
    "softmax_over_all": (9, "g (float[2,3,6,6] x) => (float[2,3,6,6] y) { y = Softmax <axis = 0> (x) }", X),
    "softmax_negative_axis": (12, "g (float[2,3,6,6] x) => (float[2,3,6,6] y) { y = Softmax <axis = -2> (x) }", X),
    "softmax_of_pooled": (9, "g (float[2,3,6,6] x) => (float[2,3,1,1] y) { a = GlobalAveragePool(x)  y = Softmax (a) }", X),
    "log_softmax_over_several": (11, "g (float[2,3,6,6] x) => (float[2,3,6,6] y) { y = LogSoftmax <axis = 1> (x) }", X),
    "hardmax_over_several": (11, "g (float[2,3,6,6] x) => (float[2,3,6,6] y) { y = Hardmax <axis = 1> (x) }", X),
    "squeeze_axes": (11, "g (float[2,1,3,1] x) => (float[2,3,1] y) { y = Squeeze <axes = [1]> (x) }", X[:, None, :, 0, :1]),
    "squeeze_all": (11, "g (float[2,1,3,1] x) => (float[2,3] y) { y = Squeeze (x) }", X[:, None, :, 0, :1]),
    "unsqueeze_axes": (11, "g (float[2,3,6,6] x) => (float[1,2,3,6,6,1] y) { y = Unsqueeze <axes = [0, 5]> (x) }", X),
    "reduce_sum_axes": (11, "g (float[2,3,6,6] x) => (float[] y) { y = ReduceSum <axes = [1, -1], keepdims = 0> (x) }", X),
    "reduce_sum_all": (11, "g (float[2,3,6,6] x) => (float[] y) { y = ReduceSum (x) }", X),
    **{
        f"{op}_axes": (13, f"{IMAGE} {{ a = Abs(x)  y = {op} <axes = [2, 3]> (a) }}", X)
        for op in (
            *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
            *("ReduceMin", "ReduceProd", "ReduceSumSquare"),
        )
    },
    "reduce_mean_all": (17, f"{IMAGE} {{ y = ReduceMean <keepdims = 0> (x) }}", X),
    "split_equal": (11, "g (float[2,3,6,6] x) => (float[] y, float[] z) { y, z = Split <axis = 2> (x) }", X),
    "split_sizes": (11, "g (float[2,3,6,6] x) => (float[] y, float[] z) { y, z = Split <axis = 3, split = [2, 4]> (x) }", X),
    "split_equal_13": (13, "g (float[2,3,6,6] x) => (float[] y, float[] z) { y, z = Split <axis = 2> (x) }", X),
    "pad_constant": (9, f"{IMAGE} {{ y = Pad <pads = [0,0,1,2,0,0,3,0], value = 1.5> (x) }}", X),
    "pad_reflect": (10, f'{IMAGE} {{ y = Pad <mode = "reflect", pads = [0,0,1,2,0,0,3,0]> (x) }}', X),
    "slice_attributes": (9, f"{IMAGE} {{ y = Slice <axes = [1, 3], starts = [1, -4], ends = [3, 9223372036854775807]> (x) }}", X),
    "slice_without_axes": (9, f"{IMAGE} {{ y = Slice <starts = [0, 1], ends = [2, 3]> (x) }}", X),
    "top_k": (9, f"{IMAGE} {{ y, i = TopK <k = 2, axis = 1> (x) }}", X),
    "upsample_nearest": (7, f'{IMAGE} {{ y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]> (x) }}', X),
    "upsample_linear": (7, f'{IMAGE} {{ y = Upsample <mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]> (x) }}', X),
    "upsample_input": (9, f'{IMAGE} <float[4] s = {{1, 1, 2, 2}}> {{ y = Upsample <mode = "nearest"> (x, s) }}', X),
    "resize_10_nearest": (10, f'{IMAGE} <float[4] s = {{1, 1, 2, 1.5}}> {{ y = Resize <mode = "nearest"> (x, s) }}', X),
    "resize_10_linear": (10, f'{IMAGE} <float[4] s = {{1, 1, 0.5, 2}}> {{ y = Resize <mode = "linear"> (x, s) }}', X),
    "resize_11_sizes": (
        11,
        f'{IMAGE} <float[0] n = {{}}, int64[4] s = {{2, 3, 9, 4}}> {{ y = Resize <mode = "linear"> (x, n, n, s) }}',
        X,
    ),
    "batch_normalization_8": (
        8,
        f"{IMAGE} <float[3] g = {{1, 2, 3}}, float[3] b = {{0, 1, 2}}, float[3] m = {{0, 1, 0}}, float[3] v = {{1, 4, 9}}>"
        "{ y = BatchNormalization <epsilon = 0.1> (x, g, b, m, v) }",
        X,
    ),
    "scatter": (
        9,
        "g (float[2,6] x) => (float[2,6] y) <int64[2,1] i = {0, 4}, float[2,1] u = {7, 8}> { y = Scatter <axis = 1> (x, i, u) }",
        X[:, 0, 0],
    ),
    "prelu_channels": (7, f"{IMAGE} <float[3,1,1] s = {{0.1, 0.2, 0.3}}> {{ y = PRelu(x, s) }}", X),
    "max_pool": (8, f"{IMAGE} {{ y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x) }}", X),
    "average_pool": (7, f"{IMAGE} {{ y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x) }}", X),
    "lp_pool": (11, f"{IMAGE} {{ y = LpPool <kernel_shape = [2, 2], p = 3> (x) }}", X),
    "one_hot": (9, "g (float[2,3,6,6] x) => (float[] y) <int64[1] d = {6}, float[2] v = {0, 1}> { i = ArgMax <axis = 3, keepdims = 0> (x)  y = OneHot (i, d, v) }", X),
    "roi_align": (
        10,
        f"{IMAGE} <float[1,4] r = {{0, 0, 5, 4}}, int64[1] b = {{1}}> {{ y = RoiAlign <output_height = 2, output_width = 2> (x, r, b) }}",
        X,
    ),
    "flatten_reshape_transpose": (
        5 + 2,
        "g (float[2,3,6,6] x) => (float[] y) <int64[2] s = {-1, 6}> { a = Transpose <perm = [0, 2, 3, 1]> (x)  b = Flatten (a)  y = Reshape (b, s) }",
        X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UPWARDS)
def test_older_operator_keeps_its_meaning(case):
    opset, text, x = UPWARDS[case]
    source = proto(text, opset=opset, ir_version=4)
    expected = run(source, {"x": x})
    actual = run(converted(source), {"x": x})
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_softmax_over_one_axis_stays_one_node():
    for name in ("softmax_over_the_last", "softmax_of_pooled"):
        opset, text, _ = UPWARDS[name]
        assert "Flatten" not in operators(converted(proto(text, opset=opset, ir_version=4)))


def test_softmax_of_unknown_rank_keeps_its_meaning():
    source = proto("g (float[] x) => (float[] y) { y = Softmax <axis = 2> (x) }", opset=11)
    result = ir.from_proto(source)
    ConvertOpsetPass()(result)
    np.testing.assert_allclose(run(result, {"x": X})[0], run(source, {"x": X})[0], rtol=1e-6)


def test_softmax_whose_rank_shows_only_in_the_new_opset_stays_one_node():
    # The number of dimensions of Reshape's result follows from the length of its shape since opset 14.
    text = """g (float[N,6,1,1] x) => (float[M,6] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] six = {6}> {
        s = Shape(x)
        i = Cast <to = 6> (s)
        n = Slice(i, zero, one)
        c = Cast <to = 7> (n)
        t = Concat <axis = 0> (c, six)
        a = Reshape(x, t)
        b = Relu(a)
        z = Softmax <axis = 1> (b)
        y = Identity(z)
    }"""
    assert "Flatten" not in operators(converted(proto(text, opset=11)))


def test_broadcast_from_an_axis_of_opset_6():
    text = "g (float[2,3,6,6] x) => (float[2,3,6,6] y) <float[3] b = {1, 2, 3}> { y = Add <axis = 1, broadcast = 1> (x, b) }"
    (y,) = run(converted(proto(text, opset=6)), {"x": X})
    np.testing.assert_array_equal(y, X + np.array([1, 2, 3], np.float32).reshape(3, 1, 1))


def test_channel_slopes_of_opset_6():
    text = "g (float[2,3,6,6] x) => (float[2,3,6,6] y) <float[3] s = {0.5, 2, 3}> { y = PRelu(x, s) }"
    (y,) = run(converted(proto(text, opset=6)), {"x": X})
    slope = np.array([0.5, 2, 3], np.float32).reshape(3, 1, 1)
    np.testing.assert_array_equal(y, np.where(X < 0, X * slope, X))


def test_attributes_of_opset_1():
    text = """g (float[2,3,6,6] x) => (float[2,18,6] y) {
        a = Relu <consumed_inputs = [0]> (x)
        b = Cast <to = "FLOAT"> (a)
        c = Reshape <shape = [0, 18, -1]> (b)
        y = Neg(c)
    }"""
    (y,) = run(converted(proto(text, opset=1)), {"x": X})
    np.testing.assert_array_equal(y, -np.maximum(X, 0).reshape(2, 18, 6))


def test_statistics_outputs_of_batch_normalization_are_dropped_unless_used():
    weights = (
        "<float[3] g = {1, 2, 3}, float[3] b = {0, 1, 2}, float[3] m = {0, 1, 0}, float[3] v = {1, 4, 9}>"
    )
    node = "y, om, ov, sm, sv = BatchNormalization (x, g, b, m, v)"
    unused = converted(proto(f"{IMAGE} {weights} {{ {node} }}", opset=9))
    assert len(node_of(unused, "BatchNormalization").outputs) == 1
    used = f"g (float[2,3,6,6] x) => (float[] y, float[3] om) {weights} {{ {node} }}"
    with pytest.raises(QatError) as caught:
        converted(proto(used, opset=9))
    assert caught.value.code == ErrorCode.MODEL_OPSET_UNSUPPORTED


# The original runs in onnxruntime up to opset 21, in ONNX's reference implementation above.
DOWNWARDS = {
    "gelu": (20, f"{IMAGE} {{ y = Gelu(x) }}"),
    "gelu_tanh": (20, f'{IMAGE} {{ y = Gelu <approximate = "tanh"> (x) }}'),
    "average_pool_dilations_of_1": (19, f"{IMAGE} {{ y = AveragePool <kernel_shape = [2, 2], dilations = [1, 1]> (x) }}"),
    "cast_saturate": (19, f"{IMAGE} {{ a = Cast <to = 6, saturate = 1> (x)  y = Cast <to = 1> (a) }}"),
    "group_normalization": (
        21,
        "g (float[2,4,3,3] x) => (float[] y) <float[4] s = {1, 2, 3, 4}, float[4] b = {0, 1, 2, 3}>"
        "{ y = GroupNormalization <num_groups = 2, epsilon = 0.01> (x, s, b) }",
    ),
    "quantize_dequantize": (
        21,
        f"{IMAGE} <float s = {{0.1}}> {{ q = QuantizeLinear <output_dtype = 3> (x, s)  y = DequantizeLinear (q, s) }}",
    ),
    "rms_normalization": (
        23,
        "g (float[2,3,6,6] x) => (float[] y) <float[6] s = {1, 2, 3, 4, 5, 6}> { y = RMSNormalization (x, s) }",
    ),
    "rms_normalization_over_two": (
        23,
        "g (float[2,3,6,6] x) => (float[] y) <float[6,6] s> { y = RMSNormalization <axis = 2, epsilon = 0.5> (x, s) }",
    ),
    "swish": (24, f"{IMAGE} {{ y = Swish <alpha = 1.5> (x) }}"),
    "convolution_22": (
        22,
        "g (float[2,3,6,6] x) => (float[] y) <float[4,3,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> { y = Conv (x, w) }",
    ),
    "reshape_21": (21, f"{IMAGE} <int64[2] s = {{0, -1}}> {{ y = Reshape (x, s) }}"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOWNWARDS)
def test_newer_operator_keeps_its_meaning(case):
    opset, text = DOWNWARDS[case]
    x = normal(2, 4, 3, 3) if case == "group_normalization" else X
    text = text.replace("<float[6,6] s>", "<float[6,6] s = {" + ", ".join(str(i) for i in range(36)) + "}>")
    source = proto(text, opset=opset, ir_version=10)
    if opset <= 21:
        expected = run(source, {"x": x})
    else:
        expected = onnx.reference.ReferenceEvaluator(source).run(None, {"x": x})
    result = converted(source)
    assert result.ir_version <= 10
    for a, b in zip(run(result, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("opset", "node"),
    [
        (19, "y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x)"),
        (19, 'y = Pad <mode = "wrap"> (x, p)'),
        (23, "y = Attention(x, x, x)"),
        (8, "y = Scan <body = b (float i) => (float o) { o = Relu(i) }, num_scan_inputs = 1> (x)"),
    ],
)
def test_what_opset_18_cannot_express_is_an_error_that_names_the_node(opset, node):
    source = proto(f"{IMAGE} <int64[8] p = {{0,0,1,1,0,0,1,1}}> {{ {node} }}", opset=opset)
    source.graph.node[0].name = "the/node"
    with pytest.raises(QatError) as caught:
        ConvertOpsetPass()(ir.from_proto(source))
    assert caught.value.code == ErrorCode.MODEL_OPSET_UNSUPPORTED
    assert caught.value.node == "the/node"


def test_subgraphs_are_converted():
    text = """g (float[2,3] x, bool c) => (float[2] y) {
        y = If (c) <
          then_branch = t () => (float[2] a) { a = ReduceSum <axes = [1], keepdims = 0> (x) },
          else_branch = e () => (float[2] b) { d = Clip <min = 0.0> (x)  b = ReduceMean <axes = [1], keepdims = 0> (d) }
        >
    }"""
    source = proto(text, opset=10, ir_version=5)
    result = converted(source)
    for condition in (True, False):
        feeds = {"x": X[0, :2, 0, :3], "c": np.array(condition)}
        np.testing.assert_allclose(run(result, feeds)[0], run(source, feeds)[0], rtol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(3, 8), (8, 8), (10, 10), (12, 10)])
def test_ir_version_is_brought_into_range(before, after):
    source = model(f"{IMAGE} {{ y = Relu(x) }}", ir_version=before)
    ConvertOpsetPass()(source)
    assert source.ir_version == after


# Changes that are not additions and still mean nothing for inference: the hint was never given a value
# that matters, inputs got other names, or the default was written differently.
HARMLESS = {
    ("Clip", 6),  # the bounds got their neutral defaults
    ("GRU", 3),  # a misspelt default
    ("LpPool", 18), ("AveragePool", 7), ("MaxPool", 8),
    ("Split", 2),  # the sizes could also be an input in opset 1: refused by the check
    ("Tile", 6),  # tiles and axis became repeats: refused by the check
}  # fmt: skip


def test_every_change_up_to_opset_18_is_an_addition_or_in_the_table():
    history: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= 18:
            history.setdefault(schema.name, []).append(schema)
    for name, schemas in history.items():
        schemas.sort(key=lambda schema: schema.since_version)
        for old, new in itertools.pairwise(schemas):
            key = (name, new.since_version)
            if key not in UPGRADES and key not in HARMLESS:
                assert _is_addition(old, new), key


def _is_addition(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    for name, attribute in old.attributes.items():
        if name not in new.attributes or new.attributes[name].type != attribute.type:
            return False
        if new.attributes[name].default_value != attribute.default_value:
            return False
    added = [attribute for name, attribute in new.attributes.items() if name not in old.attributes]
    inputs_kept = len(new.inputs) >= len(old.inputs) and new.min_input <= old.min_input
    return not new.deprecated and inputs_kept and not any(attribute.required for attribute in added)


@pytest.mark.parametrize("taken", ["c_min", "c_max", "val_0"])
@pytest.mark.parametrize("maker", ["node", "initializer"])
def test_new_constants_and_values_do_not_take_names_that_the_model_has(maker: str, taken: str) -> None:
    """c_min and c_max are what the bounds of c become; val_0 is what onnx-ir calls a value without a name."""
    before = f"{taken} = Relu(x)" if maker == "node" else ""
    declared = "" if maker == "node" else f", float[1] {taken} = {{2.0}}"
    source = proto(
        f"g (float[2,3,4,4] x) => (float[2,3,4,4] y) <float[1] w = {{3.0}}{declared}> {{ {before} "
        f"c = Clip <min = -0.5, max = 0.25> (x)  s = Softmax (c)  a = Add (s, {taken})  y = Mul (a, w) }}",
        opset=9,
    )
    (expected,) = run(source, {"x": X[:, :, :4, :4]})
    result = ir.from_proto(source)
    normalize(result)
    names = [v.name for v in (*result.graph.initializers.values(), *(n.outputs[0] for n in result.graph))]
    assert len(set(names)) == len(names)
    np.testing.assert_allclose(run(result, {"x": X[:, :, :4, :4]})[0], expected, rtol=1e-6)
