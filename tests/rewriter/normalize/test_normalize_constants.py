"""Constant sub-graphs become initializers, within bounds."""

# ruff: noqa: E501  (one case a line)

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from normalize_helpers import model, normal, operators, run
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from rewriter.normalize.constants import FOLDABLE, FoldConstantsPass, FoldLimits


def folded(text: str, limits: FoldLimits | None = None) -> tuple[ir.Model, FoldConstantsPass]:
    """The model with its constants folded, which has been checked to compute what it did before."""
    source = model(text)
    feeds = {value.name: normal(2, 3) for value in source.graph.inputs}
    expected = run(source, feeds)
    rewrite = FoldConstantsPass() if limits is None else FoldConstantsPass(limits)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(source)
    rewrite(source)
    for actual, value in zip(run(source, feeds), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-6)
    return source, rewrite


@pytest.mark.parametrize(
    "constants",
    [
        "w = Constant <value = float[3] {1, 2, 3}> ()",
        "w = Constant <value_floats = [1.0, 2.0, 3.0]> ()",
        "s = Constant <value = int64[1] {3}> ()  w = ConstantOfShape <value = float[1] {0.02}> (s)",
        "w = Identity(a)",
        "s = Constant <value_ints = [1, -1]> ()  w = Reshape(a, s)",
        "b = Cast <to = 11> (a)  c = Mul(b, b)  w = Cast <to = 1> (c)",
        "b = Transpose <perm = [1, 0]> (m)  i = Constant <value = int64 {1}> ()  w = Gather <axis = 1> (b, i)",
        "n = Shape(m)  z = Constant <value = int64 {1}> ()  c = Gather(n, z)  f = Cast <to = 1> (c)  w = Mul(a, f)",
        "w, rest = Split <num_outputs = 2, axis = 0> (m)",
    ],
)
def test_a_weight_behind_constants_becomes_an_initializer(constants):
    rewritten, _ = folded(
        f"g (float[2,3] x) => (float[2,3] y) <float[3] a = {{1, 2, 3}}, float[2,3] m = {{1, 2, 3, 4, 5, 6}}>"
        f"{{ {constants}  y = Mul(x, w) }}"
    )
    assert operators(rewritten) == {"Mul": 1}
    assert rewritten.graph[0].inputs[1].is_initializer()
    assert rewritten.graph[0].inputs[1].name == "w"


def test_a_folded_value_with_several_users_stays_one():
    rewritten, _ = folded(
        """g (float[2,3] x) => (float[2,3] y) <float[3] a = {1, 2, 3}> {
            w = Neg(a)  b = Mul(x, w)  y = Add(b, w)
        }"""
    )
    first, second = rewritten.graph[0].inputs[1], rewritten.graph[1].inputs[1]
    assert first is second


def test_what_is_no_longer_used_is_removed():
    rewritten, _ = folded(
        "g (float[2,3] x) => (float[2,3] y) <float[3] a = {1, 2, 3}> { w = Neg(a)  y = Mul(x, w) }"
    )
    assert list(rewritten.graph.initializers) == ["w"]


@pytest.mark.parametrize(
    "constant",
    [
        "w = Expand(a, s)",
        "t = Tile(a, s)  w = Reshape(t, s)",
        "z = ConstantOfShape(s)  w = Add(z, a)",
    ],
)
def test_a_small_model_does_not_become_a_large_one(constant):
    limits = FoldLimits(growth_bytes=1000, tensor_bytes=10_000)
    text = f"""g (float[2,3] x) => (float[] y) <float[1] a = {{1}}, int64[1] s = {{600}}> {{
        {constant}  m = ReduceMax(w)  y = Mul(x, m)
    }}"""
    rewritten, _ = folded(text, limits)
    assert "ReduceMax" in operators(rewritten)
    assert all(value.const_value.nbytes <= 1000 for value in rewritten.graph.initializers.values())


def test_growth_is_bounded_over_the_whole_model():
    nodes = "  ".join(f"w{i} = Expand(a, s)  b{i + 1} = Add(b{i}, w{i})" for i in range(10))
    text = f"""g (float[2,3] x) => (float[] y) <float[1] a = {{1}}, int64[2] s = {{100, 1}}> {{
        b0 = ReduceMax(x)  {nodes}  y = Identity(b10)
    }}"""
    rewritten, _ = folded(text, FoldLimits(growth_bytes=1000))
    assert operators(rewritten)["Expand"] == 8


def test_an_absurd_shape_is_left_alone():
    source = model(
        """g (float[2,3] x) => (float[] y) <int64[3] s = {1048576, 1048576, 1048576}> {
            w = ConstantOfShape(s)  y = Add(x, w)
        }"""
    )
    FoldConstantsPass()(source)
    assert "ConstantOfShape" in operators(source)


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "RandomNormalLike", "If", "Conv"])
def test_quantizers_random_numbers_and_heavy_operators_are_not_folded(op):
    assert op not in FOLDABLE


def test_a_constant_graph_output_stays():
    rewritten, _ = folded(
        "g (float[2,3] x) => (float[2,3] y, float[3] w) <float[3] a = {1, 2, 3}> { w = Neg(a)  y = Mul(x, w) }"
    )
    assert operators(rewritten) == {"Neg": 1, "Mul": 1}


def test_a_node_that_cannot_be_computed_stays():
    source = model(
        "g (float[2,3] x) => (float[] y) <float[3] a = {1, 2, 3}, float[2] b = {1, 2}> { w = Add(a, b)  y = Mul(x, w) }"
    )
    FoldConstantsPass()(source)
    assert operators(source) == {"Add": 1, "Mul": 1}


def test_a_subgraph_reads_folded_values():
    rewritten, _ = folded(
        """g (float[2,3] x) => (float[] y) <float[3] a = {1, 2, 3}, bool yes = {1}> {
            w = Neg(a)
            y = If (yes) < then_branch = t () => (float[2,3] t_y) { t_y = Mul(x, w) },
                           else_branch = e () => (float[2,3] e_y) { e_y = Add(x, w) } >
        }"""
    )
    assert operators(rewritten) == {"If": 1}


def test_a_tied_weight_is_reported():
    _, rewrite = folded(
        """g (float[2,3] x) => (float[] y) <float[2,3] table = {1, 2, 3, 4, 5, 6}> {
            t = Transpose <perm = [1, 0]> (table)
            h = MatMul(x, t)
            y = MatMul(h, table)
        }"""
    )
    (warning,) = rewrite.warnings
    assert "'table'" in warning
