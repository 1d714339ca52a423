"""Scope, overrides and bits of the recipe, node by node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.normalize.quantize_pairs import RaiseQuantizePairs
from rewriter.placement import place
from rewriter.placement.settings import has_prefix
from rewriter.quantization import IntegerRange, Plan, Quantizer
from rewriter.recipe import Override, Recipe
from tests.rewriter.graphs import graph

CHAIN = """g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2, float[4,4,1,1] w3>
{ a = Conv(x, w1)  b = Conv(a, w2)  y = Conv(b, w3) }"""


def chain() -> ir.Model:
    """Three convolutions, named a/conv, b/conv and b10/conv."""
    model = graph(CHAIN)
    for node, name in zip(model.graph, ("a/conv", "b/conv", "b10/conv"), strict=True):
        node.name = name
    return model


def quantizer(plan: Plan, name: str) -> Quantizer:
    return next(one for one in plan.quantizers if one.name == name)


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("b/conv", "b", True),
        ("b/conv", "b/", True),
        ("b/conv", "b/conv", True),
        ("b10/conv", "b", False),
        ("/b/conv", "b", False),
        ("/b/conv", "/b", True),
        ("b", "b/conv", False),
    ],
)
def test_prefixes_end_at_slashes(name: str, prefix: str, expected: bool) -> None:
    assert has_prefix(name, prefix) == expected


def test_outside_the_scope_nothing_asks_for_quantizers() -> None:
    plan = place(chain(), Recipe(scope="b"))
    assert plan.quantized_nodes == ("b/conv",)
    assert [one.name for one in plan.quantizers] == ["a", "w2", "b"]
    assert {one.node for one in plan.skipped} == {"a/conv", "b10/conv"}
    assert all("scope 'b'" in one.reason for one in plan.skipped)


def test_an_override_that_matches_nothing_is_an_error() -> None:
    recipe = Recipe(overrides=(Override(match="Conv"), Override(match="Conf", quantize=False)))
    with pytest.raises(QatError) as caught:
        place(chain(), recipe)
    assert (caught.value.code, caught.value.field) == (
        ErrorCode.RECIPE_SCOPE_UNMATCHED,
        "overrides.1.match",
    )


def test_an_override_of_an_operator_that_the_model_lacks_is_none() -> None:
    place(chain(), Recipe(overrides=(Override(match="Gemm", quantize=False),)))


def test_a_scope_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(QatError) as caught:
        place(chain(), Recipe(scope="c"))
    assert (caught.value.code, caught.value.field) == (ErrorCode.RECIPE_SCOPE_UNMATCHED, "scope")


def test_nothing_to_quantize_says_why() -> None:
    with pytest.raises(QatError) as caught:
        place(chain(), Recipe(overrides=(Override(match="Conv", quantize=False),)))
    assert caught.value.code == ErrorCode.NOTHING_TO_QUANTIZE
    assert "override" in caught.value.message


def test_the_last_matching_override_counts_alone() -> None:
    recipe = Recipe(
        overrides=(
            Override(match="Conv", weight_bits=4, per_channel=False),
            Override(match="b", weight_bits=3),
        )
    )
    plan = place(chain(), recipe)
    assert [(quantizer(plan, w).bits, quantizer(plan, w).axis) for w in ("w1", "w2", "w3")] == [
        (4, None),
        (3, 0),
        (4, None),
    ]
    assert quantizer(plan, "w2").range == IntegerRange(-3, 3)


def test_activation_bits_govern_the_result_of_a_node_and_the_inputs_that_nothing_else_makes() -> None:
    plan = place(chain(), Recipe(overrides=(Override(match="a", activation_bits=4, symmetric=True),)))
    assert [quantizer(plan, name).bits for name in ("x", "a", "b", "y")] == [4, 4, 8, 8]
    assert quantizer(plan, "a").range == IntegerRange(-8, 7)
    assert quantizer(plan, "b").range == IntegerRange(0, 255)


TARGETS = ("onnxruntime", "tf_contrib")

BLOCKS = """g (float[N,4,8,8] x) => (y)
<float[4,4,1,1] w1, float[4] b1, float[4,4,1,1] w2, float[4] b2, float[8,8] w3, float[8] b3>
{ c1 = Conv(x, w1, b1) r1 = Relu(c1) c2 = Conv(r1, w2, b2) r2 = Relu(c2) p = MatMul(r2, w3)
  y = Add(p, b3) }"""


def blocks() -> ir.Model:
    """Two convolutions with Relu and a matrix product with bias, named a/conv, a/relu, b/conv, ..., c/add."""
    model = graph(BLOCKS)
    names = ("a/conv", "a/relu", "b/conv", "b/relu", "c/product", "c/add")
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("r", "r", "r")),
        (({"match": "a"},), ("o", "r", "r")),
        (({"match": "a/conv"},), ("o", "r", "r")),
        (({"match": "Conv"},), ("o", "o", "r")),
        (({"match": "MatMul"},), ("r", "r", "o")),
        (({"match": "Conv"}, {"match": "a", "same": True}), ("r", "o", "r")),
        (({"match": "a", "same": True}, {"match": "Conv"}), ("o", "o", "r")),
    ],
    ids=["none", "prefix", "name", "type", "another type", "the last wins", "the last wins, turned round"],
)
@pytest.mark.parametrize(
    ("kind", "field", "recipe_value", "override_value"),
    [
        ("weight", "weight_bits", 8, 4),
        ("activation", "activation_bits", 8, 16),
        ("weight", "ranges", "learned", "moving_average"),
        ("activation", "ranges", "moving_average", "fixed"),
        ("weight", "quant_delay", 0, 100),
        ("activation", "quant_delay", 100, 0),
    ],
)
def test_overrides_reach_the_quantizers_of_their_nodes(
    target: str,
    overrides: tuple[dict[str, object], ...],
    expected: tuple[str, ...],
    kind: str,
    field: str,
    recipe_value: object,
    override_value: object,
) -> None:
    recipe = Recipe.parse(
        {
            "target": target,
            field: recipe_value,
            "overrides": [
                {"match": one["match"], field: recipe_value if "same" in one else override_value}
                for one in overrides
            ],
        }
    )
    plan = place(blocks(), recipe)
    names = {"weight": ("w1", "w2", "w3"), "activation": ("r1", "r2", "y")}[kind]
    attribute = "bits" if field.endswith("_bits") else field
    found = [getattr(q, attribute) for name in names for q in plan.quantizers if q.name == name]
    values = {"r": recipe_value, "o": override_value}
    # The result of a matrix product that nothing in integers reads stays float for onnxruntime.
    assert found == [values[one] for one in expected][: len(found)]
    assert len(found) == (2 if (kind, target) == ("activation", "onnxruntime") else 3)


@pytest.mark.parametrize("target", TARGETS)
def test_two_prefixes_with_other_bits_give_mixed_precision(target: str) -> None:
    recipe = Recipe.parse(
        {
            "target": target,
            "overrides": [
                {"match": "a", "weight_bits": 4, "activation_bits": 16},
                {"match": "b", "weight_bits": 2, "activation_bits": 4},
            ],
        }
    )
    bits = {q.name: q.bits for q in place(blocks(), recipe).quantizers}
    assert [bits[name] for name in ("w1", "r1", "w2", "r2", "w3")] == [4, 16, 2, 4, 8]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("symmetric", "range_", "dtype"),
    [(False, IntegerRange(0, 65535), np.uint16), (True, IntegerRange(-32768, 32767), np.int16)],
)
def test_16_bit_activations(target: str, symmetric: bool, range_: IntegerRange, dtype: type) -> None:
    plan = place(blocks(), Recipe.parse({"target": target, "activation_bits": 16, "symmetric": symmetric}))
    found = {q.range for q in plan.quantizers if q.kind == "activation"}
    assert found == {range_}
    assert range_.dtype == dtype


@pytest.mark.parametrize("target", TARGETS)
def test_layers_that_share_a_weight_and_settings_share_its_quantizer(target: str) -> None:
    model = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w, float[4] b> { "
        "[a] a = Conv(x, w, b) [b] y = Conv(a, w, b) }"
    )
    recipe = Recipe.parse({"target": target, "overrides": [{"match": "Conv", "quant_delay": 7}]})
    (weight,) = (one for one in place(model, recipe).quantizers if one.kind == "weight")
    assert (weight.quant_delay, weight.tensors[0].consumers) == (7, ("a", "b"))


def test_a_shared_range_takes_the_most_bits_of_the_operators_that_make_it() -> None:
    model = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2, float[4,8,1,1] w3> { "
        "[a] a = Conv(x, w1) [b] b = Conv(x, w2) c = Concat<axis=1>(a, b) [d] y = Conv(c, w3) }"
    )
    recipe = Recipe(
        activation_bits=3,
        overrides=(Override(match="b", activation_bits=6), Override(match="d", activation_bits=8)),
    )
    shared = quantizer(place(model, recipe), "a")
    assert [tensor.name for tensor in shared.tensors] == ["a", "b", "c"]
    assert shared.bits == 6


def test_layers_that_share_a_weight_with_other_bits_have_two_quantizers() -> None:
    model = graph("g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w> { [a] a = Conv(x, w) [b] y = Conv(a, w) }")
    plan = place(model, Recipe(overrides=(Override(match="b", weight_bits=4),)))
    weights = [one for one in plan.quantizers if one.kind == "weight"]
    assert [(one.name, one.bits, one.tensors[0].consumers) for one in weights] == [
        ("w", 8, ("a",)),
        ("w_2", 4, ("b",)),
    ]


def test_a_moving_operator_can_be_excluded() -> None:
    model = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2> { "
        "a = Conv(x, w1) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, w2) }"
    )
    plan = place(model, Recipe(overrides=(Override(match="MaxPool", quantize=False),)))
    assert [
        [tensor.name for tensor in one.tensors] for one in plan.quantizers if one.kind == "activation"
    ] == [
        ["x"],
        ["a"],
        ["b"],
        ["y"],
    ]


def test_names_do_not_collide_with_the_models() -> None:
    model = graph(
        "g (float[N,4,8,8] x, float[N,4,8,8] x_scale) => (y, w_zero_point) <float[4,4,1,1] w> { "
        "y = Conv(x, w) w_zero_point = Relu(x_scale) }"
    )
    assert [one.name for one in place(model, Recipe()).quantizers] == ["x_2", "w_2", "y"]


def test_the_plan_of_a_model_is_always_the_same_and_the_model_stays_as_it_is() -> None:
    model = chain()
    before = ir.to_proto(model).SerializeToString()
    plans = [place(model, Recipe()) for _ in range(2)] + [place(chain(), Recipe())]
    assert plans[0] == plans[1] == plans[2]
    assert ir.to_proto(model).SerializeToString() == before


def test_quantizers_that_the_model_came_with_follow_overrides_and_scope() -> None:
    """Of the node that makes their tensor; what is outside the scope stays as it is."""
    text = """g (float[1,4] x) => (y)
    <float[4,4] w, float[4,4] v, float s = {0.1}, float t = {0.2}, uint8 z = {128}> {
        a = MatMul(x, w)
        aq = QuantizeLinear(a, s, z)
        ad = DequantizeLinear(aq, s, z)
        b = MatMul(ad, v)
        bq = QuantizeLinear(b, t, z)
        bd = DequantizeLinear(bq, t, z)
        y = Relu(bd)
    }"""
    found = {}
    for name, settings in (
        ("override", {"overrides": (Override(match="b_node", ranges="fixed", quant_delay=3),)}),
        ("scope", {"scope": "a_node", "ranges": "moving_average", "quant_delay": 5}),
    ):
        model = graph(text)
        RaiseQuantizePairs()(model)
        plan = place(model, Recipe(**settings))
        existing = [quantizer for quantizer in plan.quantizers if quantizer.existing]
        found[name] = {q.tensors[0].name: (q.ranges, q.quant_delay) for q in existing}
    assert found["override"] == {"a": ("learned", 0), "b": ("fixed", 3)}
    assert found["scope"] == {"a": ("moving_average", 5), "b": ("fixed", 0)}
