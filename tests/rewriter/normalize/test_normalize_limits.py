"""A small model cannot ask for tensors of any size."""

from __future__ import annotations

import time

import onnx_ir as ir
import pytest
from normalize_helpers import model

from rewriter.errors import ErrorCode, QatError
from rewriter.normalize import normalize
from rewriter.normalize.limits import BoundTensorsPass, TensorLimits, has_long_vector
from rewriter.normalize.shapes import InferShapesPass


def source(body: str, constants: str) -> ir.Model:
    return model(
        f"""g (float[N,3] x) => (float[] y) <float[3,2] w = {{1, 2, 3, 4, 5, 6}}, {constants}> {{
            {body}  f = Cast <to = 1> (k)  r = ReduceMean <keepdims = 0> (f)  m = MatMul(x, w)  y = Add(m, r)
        }}"""
    )


HUGE = [
    ("k = Range(a, b, d)", "int64 a = {0}, int64 b = {68719476736}, int64 d = {1}"),
    ("k = Range(a, b, d)", "int64 a = {0}, int64 b = {-68719476736}, int64 d = {-1}"),
    ("k = Range(a, b, d)", "float a = {0}, float b = {1000}, float d = {0.0000001}"),
    ("k = ConstantOfShape(s)", "int64[2] s = {131072, 131072}"),
    ("k = ConstantOfShape(s)", "int64[1] s = {100000000}"),
    ("k = Expand(v, s)", "float[1] v = {1}, int64[3] s = {65536, 65536, 16}"),
    ("k = Expand(v, s)", "float[1] v = {1}, int64[3] s = {-1, 65536, 65536}"),
    ("k = Tile(v, s)", "int64[2] v = {1, 2}, int64[1] s = {17179869184}"),
    (
        "s = Constant <value_ints = [131072, 131072]> ()  k = ConstantOfShape(s)",
        "float unused = {0}",
    ),
]


@pytest.mark.parametrize(("body", "constants"), HUGE)
def test_a_tensor_without_bounds_is_refused_at_once_with_the_node(body: str, constants: str) -> None:
    graph = source(body, constants)
    (node,) = (node for node in graph.graph if node.outputs[0].name == "k")
    node.name = "bomb"
    start = time.monotonic()
    with pytest.raises(QatError, match=f"{node.op_type} makes a tensor of [0-9]+ elements") as error:
        normalize(graph)
    assert (error.value.code, error.value.node) == (ErrorCode.MODEL_TOO_LARGE, "bomb")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("k = Range(a, b, d)", "int64 a = {0}, int64 b = {1000}, int64 d = {1}"),
        ("k = Range(a, b, d)", "int64 a = {0}, int64 b = {68719476736}, int64 d = {-1}"),
        ("k = Range(a, b, d)", "int64 a = {0}, int64 b = {10}, int64 d = {0}"),
        ("k = ConstantOfShape(s)", "int64[2] s = {100, 10}"),
        ("k = Expand(v, s)", "float[1] v = {1}, int64[2] s = {100, -1}"),
        ("k = Tile(v, s)", "int64[2] v = {1, 2}, int64[1] s = {500}"),
        ("h = Shape(x)  k = ConstantOfShape(h)", "float unused = {0}"),
    ],
)
def test_tensors_within_the_limits_are_not(body: str, constants: str) -> None:
    BoundTensorsPass(TensorLimits(elements=1000, vector=1000))(source(body, constants))


def test_the_values_of_a_long_vector_are_not_followed() -> None:
    graph = model("g (float[1000000000000] x) => (float[] y) { s = Shape(x)  y = Cast<to=1>(x)  z = Neg(y) }")
    assert has_long_vector(graph)
    start = time.monotonic()
    InferShapesPass()(graph)
    assert time.monotonic() - start < 2
