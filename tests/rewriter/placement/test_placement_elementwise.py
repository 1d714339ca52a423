"""Which Adds and Muls are quantized: those between integers, and those that the recipe demands."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.quantization import Plan
from rewriter.recipe import Override, Recipe
from tests.rewriter.graphs import graph

WEIGHTS = "float[4,4,3,3] w, float[4,4,3,3] v, float[4,4] k"
CONVS = "p = Conv<pads=[1,1,1,1]>(x, w) q = Conv<pads=[1,1,1,1]>(x, v)"


def placed(body: str, recipe: Recipe | None = None) -> Plan:
    """The plan for a graph of x and u, both [N,4,8,8]: p and q are made in integers, a and b in float."""
    constants = {"s": np.float32(0.01), "z": np.uint8(100), "one": np.float32(1)}
    model = graph(
        f"g (float[N,4,8,8] x, float[N,4,8,8] u) => (y, p, q) "
        f"<{WEIGHTS}, float s, uint8 z, float one, int64[4] same, int64[8] pads> "
        f"{{ a = Sigmoid(x) b = Tanh(u) {CONVS} {body} }}",
        **constants,
        same=np.array([0, 0, 0, -1]),
        pads=np.zeros(8, np.int64),
    )
    model.opset_imports.pop("qat", None)
    normalize(model)
    return place(model, recipe or Recipe())


def why(plan: Plan, node: str) -> str:
    return next(one.reason for one in plan.skipped if one.node == node)


@pytest.mark.parametrize(
    "body",
    [
        "[add] c = Add(a, b) y = Conv(c, w)",
        "[add] c = Add(a, b) d = Reshape(c, same) y = Conv(d, w)",
        "[add] c = Add(a, b) d = Relu(c) y = Conv(d, w)",
        "[add] c = Add(p, q) y = Sigmoid(c)",
        "[add] c = Add(p, x) y = Sigmoid(c)",
        "r = Transpose(p) t = Transpose(q) [add] c = Add(r, t) y = Sigmoid(c)",
        "[first] c = Add(a, b) [add] d = Add(c, p) y = Conv(d, w)",
        "r = Transpose(a) d = Conv(r, w) [add] c = Add(a, p) e = Transpose(c) y = Sub(d, e)",
    ],
)
def test_an_add_that_is_read_in_integers_or_of_integers_is_quantized(body: str) -> None:
    assert "add" in placed(body).quantized_nodes


@pytest.mark.parametrize(
    "body",
    [
        "[add] c = Add(a, b) y = Sigmoid(c)",
        "[add] c = Add(a, p) y = Sigmoid(c)",
        "[add] c = Add(a, b) d = Pad(c, pads, one) y = Conv(d, w)",
        "m = Concat<axis=1>(p, a) n = Concat<axis=1>(q, b) [add] c = Add(m, n) y = Sigmoid(c)",
        "m = Concat<axis=1>(a, p) n = Concat<axis=1>(b, q) [add] c = Add(m, n) y = Sigmoid(c)",
        "[add] c = Add(a, b) [last] d = Add(c, a) y = Sigmoid(d)",
        "[add] c = Mul(a, b) y = Sigmoid(c)",
    ],
)
def test_an_add_between_float_operators_stays_float(body: str) -> None:
    plan = placed(body)
    assert "add" not in plan.quantized_nodes
    assert "faster in float" in why(plan, "add")
    assert not {"a", "b"} & {tensor.name for one in plan.quantizers for tensor in one.tensors}


def test_a_move_that_stays_float_reads_nothing_in_integers() -> None:
    body = "[add] c = Add(a, b) d = Reshape(c, same) y = Conv(d, w)"
    recipe = Recipe(overrides=(Override(match="Reshape", quantize=False),))
    assert "add" not in placed(body, recipe).quantized_nodes


@pytest.mark.parametrize("match", ["add", "Add"])
def test_an_override_can_demand_it(match: str) -> None:
    body = "[add] c = Add(a, b) y = Sigmoid(c)"
    demanded = Recipe(overrides=(Override(match=match, quantize=True),))
    assert "add" in placed(body, demanded).quantized_nodes
    assert "add" in placed(body, Recipe.model_validate_json(demanded.model_dump_json())).quantized_nodes
    other = Recipe(overrides=(Override(match=match, activation_bits=4),))
    assert "quantize true" in why(placed(body, other), "add")


OPERANDS = (
    "aq = QuantizeLinear(a, s, z) ad = DequantizeLinear(aq, s, z) "
    "bq = QuantizeLinear(b, s, z) bd = DequantizeLinear(bq, s, z) "
)
RESULT = "cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) y = Sigmoid(cd)"


@pytest.mark.parametrize(
    "body",
    [
        f"{OPERANDS} [add] c = Add(ad, bd) {RESULT}",
        f"{OPERANDS} [add] c = Add(ad, bd) y = Sigmoid(c)",
        f"[add] c = Add(a, b) {RESULT}",
    ],
)
def test_quantizers_that_the_model_came_with_make_integers(body: str) -> None:
    assert "add" in placed(body).quantized_nodes


def test_what_stays_float_is_said_for_every_one_of_them() -> None:
    plan = placed("[one] c = Add(a, b) [two] d = Mul(c, b) y = Sigmoid(d)")
    assert {one.node for one in plan.skipped if "faster in float" in one.reason} == {"one", "two"}
