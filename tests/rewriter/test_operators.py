"""Which input of a layer is its weight, and along which axis its output channels lie."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rewriter.operators import OPERATORS, weight_operand
from rewriter.targets import TARGETS
from tests.rewriter.graphs import graph


def layer(text: str) -> ir.Node:
    return graph(text).graph[0]


@pytest.mark.parametrize(
    ("text", "index", "axis"),
    [
        ("g (float[1,3,8,8] x) => (y) <float[4,3,3,3] w> { y = Conv(x, w) }", 1, 0),
        ("g (float[1,4,8,8] x) => (y) <float[4,1,3,3] w> { y = Conv<group=4>(x, w) }", 1, 0),
        ("g (float[1,3,8] x) => (y) <float[4,3,3] w> { y = Conv(x, w) }", 1, 0),
        ("g (float[1,3,8,8] x) => (y) <float[3,4,2,2] w> { y = ConvTranspose(x, w) }", 1, 1),
        ("g (float[1,4,8,8] x) => (y) <float[4,2,2,2] w> { y = ConvTranspose<group=2>(x, w) }", 1, None),
        ("g (float[2,3] x) => (y) <float[3,4] w> { y = Gemm(x, w) }", 1, 1),
        ("g (float[2,3] x) => (y) <float[4,3] w> { y = Gemm<transB=1>(x, w) }", 1, 0),
        ("g (float[3,2] x) => (y) <float[4,3] w> { y = Gemm<transA=1, transB=1>(x, w) }", 1, 0),
        ("g (float[5,2,3] x) => (y) <float[3,4] w> { y = MatMul(x, w) }", 1, 1),
        ("g (float[5,3,2] x) => (y) <float[4,3] w> { y = MatMul(w, x) }", 0, 0),
        ("g (float[5,2,3] x) => (y) <float[5,3,4] w> { y = MatMul(x, w) }", 1, None),
        ("g (float[5,2,3] x) => (y) <float[3] w> { y = MatMul(x, w) }", 1, None),
    ],
)
def test_weight_and_its_output_axis(text: str, index: int, axis: int | None) -> None:
    found = weight_operand(layer(text))
    assert found is not None
    assert (found.index, found.value.name, found.axis) == (index, "w", axis)
    assert bool(found.why_no_axis) == (axis is None)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2,3] x, float[3,4] w) => (y) { y = MatMul(x, w) }",
        "g (float[1,3,8,8] x, float[4,3,3,3] w) => (y) { y = Conv(x, w) }",
        "g (float[2,3] x) => (y) <float[3] w> { y = Add(x, w) }",
    ],
)
def test_no_weight(text: str) -> None:
    assert weight_operand(layer(text)) is None


def test_targets_only_name_operators_that_the_table_knows() -> None:
    for policy in TARGETS.values():
        if (operators := policy.operators) is not None:
            assert operators.quantized | operators.fused_activations <= OPERATORS.keys()
