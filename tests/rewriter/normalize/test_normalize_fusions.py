"""Biases, HardSwish and nodes that do nothing: what is rewritten, what is left, and the numbers."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from normalize_helpers import model, node_of, normal, operators, run
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.normalize.activations import FuseHardSwishPass
from rewriter.normalize.bias import FuseBiasPass
from rewriter.normalize.elimination import EliminateNodesPass
from rewriter.normalize.shapes import InferShapesPass


def apply(rewrite: ir.passes.InPlacePass, text: str, *feeds: np.ndarray) -> ir.Model:
    """The model after `rewrite`, which has been checked to compute what it did before."""
    source = model(text)
    InferShapesPass()(source)
    inputs = dict(zip((value.name for value in source.graph.inputs), feeds, strict=True))
    names = [value.name for value in source.graph.outputs]
    expected = run(source, inputs)
    rewrite(source)
    RemoveUnusedNodesPass()(source)
    assert [value.name for value in source.graph.outputs] == names
    for actual, value in zip(run(source, inputs), expected, strict=True):
        assert actual.shape == value.shape
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-6)
    return source


# Rule 1 of FuseBiasPass.

IMAGE = normal(2, 2, 4, 4)


def with_bias(op: str, bias: str, add: str = "y = Add(c, b)", outputs: str = "float[] y") -> str:
    shape = "3, 2, 1, 1" if op == "Conv" else "2, 3, 1, 1"
    values = ", ".join(["0.5", "-1", "2", "1", "3", "-2"])
    return (
        f"g (float[2,2,4,4] x) => ({outputs}) <float[{shape}] w = {{{values}}}, float{bias}>"
        f"{{ c = {op} (x, w)  {add} }}"
    )


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    "bias",
    [
        "[3,1,1] b = {1, 2, 3}",
        "[1,3,1,1] b = {1, 2, 3}",
        "[1] b = {7}",
        "[1,1,1] b = {7}",
        "[1,1,1,1] b = {7}",
    ],
)
@pytest.mark.parametrize("add", ["y = Add(c, b)", "y = Add(b, c)"])
def test_a_constant_per_channel_after_a_convolution_is_its_bias(op, bias, add):
    rewritten = apply(FuseBiasPass(), with_bias(op, bias, add), IMAGE)
    assert operators(rewritten) == {op: 1}
    assert list(node_of(rewritten, op).inputs[2].shape) == [3]


@pytest.mark.parametrize(
    ("bias", "add", "outputs"),
    [
        ("[4] b = {1, 2, 3, 4}", "y = Add(c, b)", "float[] y"),  # along the width
        ("[1,3,1,4] b = {1,2,3,4,5,6,7,8,9,10,11,12}", "y = Add(c, b)", "float[] y"),
        ("[2,3,1,1] b = {1, 2, 3, 4, 5, 6}", "y = Add(c, b)", "float[] y"),  # not the same for all samples
        ("[1,1,1,1,1] b = {1}", "y = Add(c, b)", "float[] y"),  # changes the rank
        ("[3,1,1] b = {1, 2, 3}", "y = Add(c, b)  z = Relu(c)", "float[] y, float[] z"),
        ("[3,1,1] b = {1, 2, 3}", "y = Add(c, b)", "float[] y, float[] c"),
        ("[3,1,1] b = {1, 2, 3}", "y = Add(c, c)", "float[] y"),
    ],
)
def test_what_is_not_a_bias_of_the_convolution_stays(bias, add, outputs):
    rewritten = apply(FuseBiasPass(), with_bias("Conv", bias, add, outputs), IMAGE)
    assert operators(rewritten)["Add"] == 1


def test_grouped_transposed_convolution_has_a_bias_per_output_channel():
    text = """g (float[2,2,4,4] x) => (float[] y)
        <float[2,3,1,1] w = {1, 2, 3, 4, 5, 6}, float[6,1,1] b = {1, 2, 3, 4, 5, 6}>
        { c = ConvTranspose <group = 2> (x, w)  y = Add(c, b) }"""
    assert operators(apply(FuseBiasPass(), text, IMAGE)) == {"ConvTranspose": 1}


def test_a_bias_shared_by_two_convolutions_is_each_ones_own():
    text = """g (float[2,2,4,4] x) => (float[] y, float[] z)
        <float[1,2,1,1] w = {1, 2}, float[1,1,1] b = {3}>
        { c = Conv(x, w)  y = Add(c, b)  d = Conv(x, w)  z = Add(d, b) }"""
    rewritten = apply(FuseBiasPass(), text, IMAGE)
    assert operators(rewritten) == {"Conv": 2}
    first, second = (node.inputs[2] for node in rewritten.graph)
    assert first is not second


@pytest.mark.parametrize("constant", ["[1,1,1] b = {3}", "[2,1,1] b = {3, -4}", "[1,2,1,1] b = {3, -4}"])
@pytest.mark.parametrize("add", ["y = Add(c, b)", "y = Add(b, c)"])
def test_a_second_constant_is_added_to_the_bias(constant, add):
    text = f"""g (float[2,2,4,4] x) => (float[] y)
        <float[2,2,1,1] w = {{1, 2, -1, 3}}, float[2] a = {{5, 6}}, float{constant}>
        {{ c = Conv(x, w, a)  {add} }}"""
    rewritten = apply(FuseBiasPass(), text, IMAGE)
    assert operators(rewritten) == {"Conv": 1}
    assert node_of(rewritten, "Conv").inputs[2].name == "a"


@pytest.mark.parametrize(
    ("parameters", "nodes", "outputs"),
    [
        ("float[1] a = {5}", "c = Conv(x, w, a)  d = Conv(x, w, a)  y = Add(c, b)", "float[] y, float[] d"),
        ("float[1] z = {5}", "a = Neg(z)  c = Conv(x, w, a)  y = Add(c, b)", "float[] y"),
    ],
)
def test_a_second_constant_stays_after_a_bias_that_is_shared_or_computed(parameters, nodes, outputs):
    text = f"""g (float[2,2,4,4] x) => ({outputs})
        <float[1,2,1,1] w = {{1, 2}}, float[1,1,1] b = {{3}}, {parameters}> {{ {nodes} }}"""
    assert operators(apply(FuseBiasPass(), text, IMAGE))["Add"] == 1


# Rule 2.

ROWS = normal(5, 2)
WEIGHT = "float[2,3] w = {1, 2, 3, 4, 5, 6}"


@pytest.mark.parametrize("bias", ["[3] b = {1, 2, 3}", "[1,3] b = {1, 2, 3}"])
@pytest.mark.parametrize("add", ["y = Add(c, b)", "y = Add(b, c)"])
def test_matrix_product_and_bias_become_gemm(bias, add):
    text = f"g (float[N,2] x) => (float[] y) <{WEIGHT}, float{bias}> {{ c = MatMul(x, w)  {add} }}"
    rewritten = apply(FuseBiasPass(), text, ROWS)
    assert operators(rewritten) == {"Gemm": 1}
    assert list(node_of(rewritten, "Gemm").inputs[2].shape) == [3]


@pytest.mark.parametrize(
    ("x", "initializers", "nodes"),
    [
        ("[N,4,2]", f"{WEIGHT}, float[3] b = {{1, 2, 3}}", "c = MatMul(x, w)  y = Add(c, b)"),
        ("[]", f"{WEIGHT}, float[3] b = {{1, 2, 3}}", "c = MatMul(x, w)  y = Add(c, b)"),
        ("[N,2]", f"{WEIGHT}, float[1] b = {{1}}", "c = MatMul(x, w)  y = Add(c, b)"),
        ("[N,2]", "float[2] w = {1, 2}, float[1] b = {1}", "c = MatMul(x, w)  y = Add(c, b)"),
        ("[N,2]", f"{WEIGHT}, float[3] b = {{1, 2, 3}}", "c = MatMul(x, w)  d = Add(c, b)  y = Add(d, c)"),
    ],
)  # fmt: skip
def test_matrix_products_that_are_no_gemm_stay(x, initializers, nodes):
    feed = normal(5, 4, 2) if x == "[N,4,2]" else ROWS
    text = f"g (float{x} x) => (float[] y) <{initializers}> {{ {nodes} }}"
    assert operators(apply(FuseBiasPass(), text, feed))["MatMul"] == 1


# FuseHardSwishPass.

CONSTANTS = "float three = {3}, float zero = {0}, float six = {6}, float sixth = {0.16666667}"
VECTOR = np.linspace(-5, 5, 21, dtype=np.float32)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", "[3]", "[1,3]", "[1]", "[1,1]", "[5,3]", "[5,1]"])
def test_the_factors_of_a_gemm_go_into_its_constants(bias: str, trans_b: int) -> None:
    weight = "[3,4]" if trans_b else "[4,3]"
    declared = (
        f", float{bias} b = {{{', '.join(['0.7', '-0.3', '1.1'] * 5)[: _length(bias)]}}}" if bias else ""
    )
    text = (
        f"g (float[5,4] x) => (float[5,3] y) <float{weight} w = {{{NUMBERS}}}{declared}> "
        f"{{ y = Gemm <alpha = 0.3, beta = 1.7, transB = {trans_b}> (x, w{', b' if bias else ''}) }}"
    )
    rewritten = apply(FuseBiasPass(), text, normal(5, 4))
    gemm = node_of(rewritten, "Gemm")
    assert not {"alpha", "beta"} & set(gemm.attributes)
    assert set(rewritten.graph.initializers) == {"w", "b"} - (set() if bias else {"b"})
    if bias and not bias.startswith("[5"):
        assert list(gemm.inputs[2].shape) == [3]


NUMBERS = "0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6"


def _length(shape: str) -> int:
    """Characters of that many of the numbers of the biases."""
    count = int(np.prod([int(size) for size in shape[1:-1].split(",")]))
    return len(", ".join((["0.7", "-0.3", "1.1"] * 5)[:count]))


def test_a_scalar_bias_of_a_gemm_has_one_value_per_channel():
    constants = f"float[4,3] w = {{{NUMBERS}}}, float b = {{0.7}}"
    text = f"g (float[5,4] x) => (float[5,3] y) <{constants}> {{ y = Gemm(x, w, b) }}"
    gemm = node_of(apply(FuseBiasPass(), text, normal(5, 4)), "Gemm")
    np.testing.assert_array_equal(gemm.inputs[2].const_value.numpy(), np.full(3, 0.7, np.float32))


@pytest.mark.parametrize(
    ("signature", "nodes"),
    [
        ("float[5,4] x, float[4,3] w, float[3] b", "y = Gemm <alpha = 0.3, beta = 1.7> (x, w, b)"),
        (f"float[5,4] x) => (float[5,3] y) <float[4,3] w = {{{NUMBERS}}}", "y = Gemm <alpha = 0.0> (x, w)"),
        (
            f"float[5,4] x) => (float[5,3] y) <float[4,3] w = {{{NUMBERS}}}",
            "a = Gemm <alpha = 0.3> (x, w)  b = MatMul(x, w)  y = Add(a, b)",
        ),
    ],
    ids=["not_constant", "zero", "shared"],
)
def test_factors_stay_where_the_constants_are_not_the_gemms_own(signature, nodes):
    is_fed = "y)" not in signature
    text = f"g ({signature}{') => (float[5,3] y)' if is_fed else '>'} {{ {nodes} }}"
    feeds = [normal(5, 4), *([normal(4, 3), normal(3)] if is_fed else [])]
    rewritten = apply(FuseBiasPass(), text, *feeds)
    assert "alpha" in node_of(rewritten, "Gemm").attributes


def hard_swish_graphs() -> dict[str, str]:
    add = {"x+3": "a = Add(x, three)", "3+x": "a = Add(three, x)"}
    clip = "r = Clip(a, zero, six)"
    tail = {
        "(x*r)/6": "m = Mul(x, r)  y = Div(m, six)",
        "(r*x)*1/6": "m = Mul(r, x)  y = Mul(m, sixth)",
        "1/6*(x*r)": "m = Mul(x, r)  y = Mul(sixth, m)",
        "x*(r/6)": "m = Div(r, six)  y = Mul(x, m)",
        "(1/6*r)*x": "m = Mul(sixth, r)  y = Mul(m, x)",
    }
    graphs = {f"{a}, {t}": f"{add[a]}  {clip}  {tail[t]}" for a, t in itertools.product(add, tail)}
    gate = "h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)"
    graphs["x*HardSigmoid"] = f"{gate}  y = Mul(x, h)"
    graphs["HardSigmoid*x"] = f"{gate}  y = Mul(h, x)"
    return graphs


@pytest.mark.parametrize("nodes", hard_swish_graphs().values(), ids=hard_swish_graphs())
def test_hard_swish_is_found(nodes):
    text = f"g (float[21] x) => (float[21] y) <{CONSTANTS}> {{ {nodes} }}"
    assert operators(apply(FuseHardSwishPass(), text, VECTOR)) == {"HardSwish": 1}


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Add(x, three)  r = Clip(a, zero, six)  m = Mul(x, x)  y = Div(m, six)",
        "a = Add(x, three)  r = Clip(a, zero, three)  m = Mul(x, r)  y = Div(m, six)",
        "a = Add(x, six)  r = Clip(a, zero, six)  m = Mul(x, r)  y = Div(m, six)",
        "a = Add(x, three)  r = Clip(a, zero, six)  m = Mul(x, r)  y = Div(six, m)",
        "a = Add(x, three)  r = Clip(a, zero, six)  m = Mul(a, r)  y = Div(m, six)",
        "a = Add(x, three)  r = Clip(a, zero, six)  m = Mul(x, r)  n = Div(m, six)  y = Add(n, r)",
        "h = HardSigmoid(x)  y = Mul(x, h)",
        "h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)  m = Mul(x, h)  y = Add(m, h)",
    ],
)
def test_what_is_not_hard_swish_or_is_needed_in_between_stays(nodes):
    text = f"g (float[21] x) => (float[21] y) <{CONSTANTS}> {{ {nodes} }}"
    assert "HardSwish" not in operators(apply(FuseHardSwishPass(), text, VECTOR + 0.25))


def test_a_constant_that_adds_a_dimension_stays():
    text = """g (float[21] x) => (float[] y)
        <float[1,1] three = {3}, float zero = {0}, float six = {6}>
        { a = Add(x, three)  r = Clip(a, zero, six)  m = Mul(x, r)  y = Div(m, six) }"""
    assert "HardSwish" not in operators(apply(FuseHardSwishPass(), text, VECTOR))


# EliminateNodesPass.


@pytest.mark.parametrize(
    ("outputs", "nodes", "left"),
    [
        ("float[] y", "a = Identity(x)  y = Relu(a)", {"Relu": 1}),
        ("float[] y", "a = Relu(x)  y = Identity(a)", {"Relu": 1}),
        ("float[] y", "a = Relu(x)  b = Identity(a)  y = Identity(b)", {"Relu": 1}),
        ("float[] y", "y = Identity(x)", {"Identity": 1}),  # an input keeps its name
        ("float[] y", "y = Identity(w)", {"Identity": 1}),
        ("float[] y, float[] a", "a = Relu(x)  y = Identity(a)", {"Relu": 1, "Identity": 1}),
        ("float[] y, float[] z", "a = Relu(x)  y = Identity(a)  z = Identity(a)", {"Relu": 1, "Identity": 1}),
        ("float[] y", "a = Dropout(x)  y = Relu(a)", {"Relu": 1}),
        ("float[] y", "a = Dropout(x, ratio)  y = Relu(a)", {"Relu": 1}),
        ("float[] y", "a = Dropout(x, ratio, no)  y = Relu(a)", {"Relu": 1}),
        ("float[] y", "a, mask = Dropout(x, ratio)  y = Relu(a)", {"Relu": 1}),
        ("float[] y, bool[] mask", "a, mask = Dropout(x, ratio)  y = Relu(a)", {"Dropout": 1, "Relu": 1}),
        ("float[] y", "a = Sum(x)  y = Relu(a)", {"Relu": 1}),
        ("float[] y", "y = Sum(x, w)", {"Add": 1}),
        ("float[] y", "a = Relu(x)  y = Sum(x, w, a, x)", {"Relu": 1, "Add": 3}),
    ],
)
def test_nodes_that_do_nothing_are_removed(outputs, nodes, left):
    text = f"""g (float[3] x) => ({outputs})
        <float[3] w = {{1, 2, 3}}, float ratio = {{0.5}}, bool no = {{0}}> {{ {nodes} }}"""
    assert operators(apply(EliminateNodesPass(), text, normal(3))) == left


def test_dropout_that_is_switched_on_stays():
    source = model(
        "g (float[3] x) => (float[3] y) <float ratio = {0.5}, bool yes = {1}> { y = Dropout(x, ratio, yes) }"
    )
    assert not EliminateNodesPass()(source).modified


def test_an_identity_inside_a_subgraph_stays():
    text = """g (float[3] x, bool c) => (float[3] y) {
        a = Relu(x)
        y = If (c) < then_branch = t () => (float[3] t_y) { t_y = Identity(a) },
                     else_branch = e () => (float[3] e_y) { e_y = Neg(a) } >
    }"""
    rewritten = apply(EliminateNodesPass(), text, normal(3), np.array(True))
    assert operators(rewritten) == {"Relu": 1, "If": 1}
