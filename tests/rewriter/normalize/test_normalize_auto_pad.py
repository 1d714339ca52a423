"""Automatic padding, written out: the same numbers as onnxruntime's automatic padding."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from normalize_helpers import model, normal, operators, run
from onnx import helper

from rewriter.errors import ErrorCode, QatError
from rewriter.normalize.auto_pad import ExplicitPadsPass
from rewriter.normalize.shapes import InferShapesPass


def one_node(
    op_type: str, x_shape: list[int | str], weight: tuple[int, ...] | None, **attributes
) -> ir.Model:
    inputs = ["x"] if weight is None else ["x", "w"]
    initializers = [] if weight is None else [onnx.numpy_helper.from_array(normal(*weight, seed=1), "w")]
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, ["y"], name="the/node", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", 1, x_shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        initializers,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def assert_same_with_explicit_pads(source: ir.Model, x: np.ndarray) -> None:
    (expected,) = run(source, {"x": x})
    assert ExplicitPadsPass()(source).modified
    assert not any("auto_pad" in node.attributes for node in source.graph)
    (actual,) = run(source, {"x": x})
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


GEOMETRY = {
    "mode": st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
    "size": st.integers(7, 12),
    "kernel": st.integers(1, 4),
    "stride": st.integers(1, 3),
    "known": st.booleans(),
}


# With a stride larger than the kernel ONNX pads nothing; onnxruntime pads a negative number.
def fits(mode: str, kernel: int, stride: int) -> bool:
    return mode == "VALID" or stride <= kernel


@given(**GEOMETRY)
def test_convolution(mode, size, kernel, stride, known):
    # There onnxruntime crops the first row: a negative pad of -2 in all, -1 on each side.
    assume(mode == "VALID" or stride - kernel <= 1)
    assume(fits(mode, kernel, stride))
    spatial = [size, size + 1] if known else ["H", "W"]
    settings = {"auto_pad": mode, "strides": [stride, 1]}
    source = one_node("Conv", ["N", 2, *spatial], (4, 1, kernel, 3), group=2, **settings)
    assert_same_with_explicit_pads(source, normal(2, 2, size, size + 1))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [7, 9, 12])
def test_a_stride_that_skips_more_than_the_kernel_pads_nothing(mode, known, size):
    """ONNX: ceil(size / stride) outputs and no negative pads: windows start at 0, stride, 2 stride, ..."""
    spatial = [size, size] if known else ["H", "W"]
    source = one_node("Conv", ["N", 2, *spatial], (3, 2, 1, 1), auto_pad=mode, strides=[3, 3])
    weight = source.graph.initializers["w"].const_value.numpy()[:, :, 0, 0]
    x = normal(2, 2, size, size)
    ExplicitPadsPass()(source)
    expected = np.einsum("oc,nchw->nohw", weight.astype(np.float64), x[:, :, ::3, ::3].astype(np.float64))
    np.testing.assert_allclose(run(source, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("known", [True, False])
def test_dilated_convolution_is_padded_for_the_dilated_kernel(mode, stride, known):
    # onnxruntime refuses dilations with automatic padding; zeros in the kernel are the same.
    spatial = [9, 10] if known else ["H", "W"]
    settings = {"auto_pad": mode, "strides": [stride, stride]}
    source = one_node("Conv", ["N", 2, *spatial], (3, 2, 2, 4), dilations=[3, 2], **settings)
    weight = np.zeros((3, 2, 4, 7), np.float32)
    weight[:, :, ::3, ::2] = source.graph.initializers["w"].const_value.numpy()
    wide = one_node("Conv", ["N", 2, *spatial], weight.shape, **settings)
    wide.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    x = normal(2, 2, 9, 10)
    (expected,) = run(wide, {"x": x})
    ExplicitPadsPass()(source)
    np.testing.assert_allclose(run(source, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("known", [True, False])
def test_convolution_over_one_or_three_dimensions(rank, mode, known):
    size = [9] * rank if known else [f"d{i}" for i in range(rank)]
    settings = {"auto_pad": mode, "strides": [2] * rank}
    source = one_node("Conv", ["N", 2, *size], (3, 2, *[4] * rank), **settings)
    assert_same_with_explicit_pads(source, normal(2, 2, *[9] * rank))


@given(**GEOMETRY)
def test_max_pool_ignores_padded_elements(mode, size, kernel, stride, known):
    assume(fits(mode, kernel, stride))
    spatial = [size, size] if known else ["H", "W"]
    settings = {"auto_pad": mode, "strides": [stride, stride], "kernel_shape": [kernel, kernel]}
    source = one_node("MaxPool", ["N", 2, *spatial], None, **settings)
    assert_same_with_explicit_pads(source, normal(2, 2, size, size) - 10.0)


@given(counted=st.integers(0, 1), **GEOMETRY)
def test_average_pool(mode, size, kernel, stride, known, counted):
    assume(fits(mode, kernel, stride))
    known = known or not counted or mode == "VALID"
    spatial = [size, size] if known else ["H", "W"]
    settings = {"auto_pad": mode, "strides": [stride, stride], "kernel_shape": [kernel, kernel]}
    source = one_node("AveragePool", ["N", 2, *spatial], None, count_include_pad=counted, **settings)
    assert_same_with_explicit_pads(source, normal(2, 2, size, size))


@given(**GEOMETRY)
def test_lp_pool(mode, size, kernel, stride, known):
    assume(fits(mode, kernel, stride))
    spatial = [size, size] if known else ["H", "W"]
    settings = {"auto_pad": mode, "strides": [stride, stride], "kernel_shape": [kernel, kernel]}
    source = one_node("LpPool", ["N", 2, *spatial], None, p=2, **settings)
    assert_same_with_explicit_pads(source, normal(2, 2, size, size))


def test_average_pool_of_unknown_size_that_leaves_padding_out_is_unsupported():
    settings = {"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [3, 3]}
    source = one_node("AveragePool", ["N", 2, "H", "W"], None, **settings)
    with pytest.raises(QatError) as caught:
        ExplicitPadsPass()(source)
    assert (caught.value.code, caught.value.node) == (ErrorCode.MODEL_UNSUPPORTED, "the/node")


@given(
    mode=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
    kernel=st.integers(3, 5),
    stride=st.integers(1, 3),
    known=st.booleans(),
)
def test_transposed_convolution(mode, kernel, stride, known):
    spatial = [6, 7] if known else ["H", "W"]
    settings = {"auto_pad": mode, "strides": [stride, stride], "group": 2}
    source = one_node("ConvTranspose", ["N", 4, *spatial], (4, 3, kernel, kernel), **settings)
    assert_same_with_explicit_pads(source, normal(2, 4, 6, 7))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_transposed_convolution_with_output_shape(mode):
    settings = {"auto_pad": mode, "strides": [2, 2], "output_shape": [12, 13]}
    source = one_node("ConvTranspose", ["N", 2, 6, 7], (2, 3, 3, 3), **settings)
    assert_same_with_explicit_pads(source, normal(2, 2, 6, 7))


def test_shapes_stay_known_where_the_size_is():
    source = one_node("Conv", ["N", 2, 9, 9], (3, 2, 4, 4), auto_pad="SAME_UPPER", strides=[2, 2])
    ExplicitPadsPass()(source)
    InferShapesPass()(source)
    assert [str(dim) for dim in source.graph.outputs[0].shape] == ["N", "3", "5", "5"]
    assert operators(source) == {"Conv": 1}


def test_not_set_is_dropped_and_pads_stay():
    source = model(
        """g (float[N,2,8,8] x) => (float[] y) {
             y = MaxPool <auto_pad = "NOTSET", kernel_shape = [3, 3], pads = [1, 1, 0, 0]> (x)
           }"""
    )
    assert_same_with_explicit_pads(source, normal(2, 2, 8, 8))
    assert source.graph[0].attributes["pads"].as_ints() == (1, 1, 0, 0)
