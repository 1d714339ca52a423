"""Target tf_contrib against what TensorFlow 1.15.5 did: the rows of the decision table (2.4), the placement
requirements of its tests (R..), and counts of whole models, all from docs/tf-contrib-quantize.md.

Rows that no ONNX graph can be:

* "const-weight conv": every weight is an initializer, and initializers count as variables.
* "BN with tensor-valued training flag", "Keras BN with learning phase unset": training_mode is an attribute.
* "conv+BN with updates_collections=None", R32 and R69: that Identity is gone after normalization.
* R39 (disabled upstream); R47, R48, R50, R51: TensorFlow's name scopes and partitioned variables.
* R58, R64, R68: an atrous convolution is a Conv with dilations, not SpaceToBatch and BatchToSpace around one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from rewriter.errors import ErrorCode, QatError
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.insertion import insert
from rewriter.load import load
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.quantization import IntegerRange, Plan, Quantizer
from rewriter.recipe import Override, Recipe
from tests.rewriter.graphs import graph, listing, ranges_of
from tests.rewriter.placement.test_placement_invariants import networks, require_invariants

TF_CONTRIB = Recipe(target="tf_contrib", per_channel=False)

WEIGHTS = (
    "float[4,4,1,1] w, float[4] b, float[4,4,1,1] w2, float[4] b2, float[4,4,1,1] w3, float[4,1,3,3] d, "
    "float[4,1,3,3] d2, float[8,8] m, float[8] mb, float[4,8,8] batch, float[4,4,1] w1d, "
    "float[4,4,1,1,1] w3d, float zero, float three, float six, float k, "
    "int64[3] as1d, int64[5] as3d, float[4] scales, "
    "float[4] gamma, float[4] beta, float[4] mean, float[4] variance"
)
VALUES = {
    "zero": np.float32(0),
    "three": np.float32(3),
    "six": np.float32(6),
    "as1d": np.array([0, 4, -1]),
    "as3d": np.array([0, 4, 8, 8, 1]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "variance": np.ones(4, np.float32),
}


def model_of(body: str) -> ir.Model:
    """[N,4,8,8] tensors x and s come in, `out` goes out; batch norms are folded where that is possible.

    Nodes are named like [s1__conv], which is s1/conv, else after their result.
    """
    text = f"g (float[N,4,8,8] x, float[N,4,8,8] s) => (out) <{WEIGHTS}> {{ {body} }}"
    model = graph(text, **VALUES)
    for node in model.graph:
        node.name = (node.name or "").replace("__", "/")
    fold_batch_norms(model)
    return model


def quantized(plan: Plan) -> list[str]:
    return [tensor.name for quantizer in plan.quantizers for tensor in quantizer.tensors]


def placed(body: str, recipe: Recipe = TF_CONTRIB) -> set[str]:
    """Names of the tensors that get a quantizer; none where nothing can be quantized."""
    try:
        names = quantized(place(model_of(body), recipe))
    except QatError as error:
        if error.code != ErrorCode.NOTHING_TO_QUANTIZE:
            raise
        return set()
    assert len(set(names)) == len(names)
    return set(names)


def quantizer(plan: Plan, tensor: str) -> Quantizer:
    return next(q for q in plan.quantizers if q.tensors[0].name == tensor)


CONV = "c = Conv(x, w, b)"
BATCH_NORM = "BatchNormalization(c, gamma, beta, mean, variance)"

# Row of the table, graph, names of the quantized tensors: w, w2, d, m are weights.
TABLE = [
    ("conv+bias+relu", f"{CONV} out = Relu(c)", "w out"),
    ("conv+relu", "c = Conv(x, w) out = Relu(c)", "w out"),
    ("conv+BN+relu", f"c = Conv(x, w) n = {BATCH_NORM} out = Relu(n)", "w out"),
    ("fc+bias+relu", "c = Flatten<axis=3>(x) y = Gemm(c, m, mb) out = Relu(y)", "m out"),
    ("fc+relu", "y = MatMul(x, m) out = Relu(y)", "m out"),
    ("fc+Add(bias)+relu", "y = MatMul(x, m) z = Add(y, mb) out = Relu(z)", "m out"),
    ("conv+bias, no act", "out = Conv(x, w, b)", "w out"),
    ("fc+Add(bias), no act", "y = MatMul(x, m) out = Add(mb, y)", "m out"),
    ("conv, no bias, no BN, then non-Relu op", "c = Conv(x, w) out = Concat<axis=1>(c, s)", ""),
    *(
        (f"conv+bias+{op}", f"{CONV} out = {op}(c)", "w c")
        for op in ("Sigmoid", "Tanh", "Elu", "Selu", "LeakyRelu", "Softmax")
    ),
    ("conv(nobias)+sigmoid", "c = Conv(x, w) out = Sigmoid(c)", ""),
    ("conv(nobias)+leaky", "c = Conv(x, w) out = LeakyRelu(c)", ""),
    ("conv+bias+swish", f"{CONV} g = Sigmoid(c) out = Mul(c, g)", "w c out"),
    (
        "conv+bias+hard-swish y*relu6(y+3)/6",
        f"{CONV} a = Add(c, three) r = Clip(a, zero, six) p = Mul(c, r) out = Div(p, six)",
        "w c r p",
    ),
    ("conv+bias+hard-swish, as one operator", f"{CONV} out = HardSwish(c)", "w c out"),
    ("conv+bias+Add(x)+relu", f"{CONV} a = Add(c, s) out = Relu(a)", "w c out"),
    ("conv+bias+Add(x), next conv", f"{CONV} a = Add(s, c) out = Conv(a, w2)", "w c a"),
    ("conv+relu+Add(x), next conv", f"{CONV} r = Relu(c) a = Add(r, s) out = Conv(a, w2)", "w r a"),
    ("conv+relu+Add(x)+relu", f"{CONV} r = Relu(c) a = Add(r, s) out = Relu(a)", "w r"),
    (
        "two conv branches+Add+relu",
        f"{CONV} e = Conv(s, w2, b2) a = Add(c, e) out = Relu(a)",
        "w w2 c e out",
    ),
    (
        "separable conv without inner act",
        "e = Conv<group=4, pads=[1,1,1,1]>(x, d) c = Conv(e, w, b) out = Relu(c)",
        "d w e out",
    ),
    ("conv+bias+maxpool+relu", f"{CONV} p = MaxPool<kernel_shape=[2,2]>(c) out = Relu(p)", "w c"),
    *(
        (f"{op.split('(')[0].split('<')[0]}: nothing", f"{CONV} r = Relu(c) out = {op}", "w r")
        for op in (
            "Concat<axis=1>(r, s)", "AveragePool<kernel_shape=[2,2]>(r)", "GlobalAveragePool(r)",
            "ReduceMean(r)", "Softmax(r)", "Resize(r, , scales)", "Sigmoid(r)",
            "MaxPool<kernel_shape=[2,2]>(r)", "Sub(r, s)", "Div(r, s)",
        )
    ),
    ("conv transpose", "c = ConvTranspose(x, w, b) out = Relu(c)", ""),
    ("conv+bias+BN, BN not folded", f"{CONV} n = {BATCH_NORM} out = Add(n, c)", "w c out"),
    ("conv+BN, BN not folded", f"c = Conv(x, w) n = {BATCH_NORM} p = Relu(n) out = Sub(p, c)", ""),
    (
        "BN->relu->conv (pre-activation)",
        "n = BatchNormalization(x, gamma, beta, mean, variance) r = Relu(n) out = Conv(r, w, b)",
        "w out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "body", "names"), TABLE, ids=[row for row, *_ in TABLE])
def test_decision_table(row: str, body: str, names: str) -> None:
    assert placed(body) == set(names.split())


# Section 2.1 to 2.3 and the tests of the original.
RULES = [
    ("1-D convolutions are no layers", "y = Reshape(x, as1d) c = Conv(y, w1d, b) out = Relu(c)", ""),
    ("3-D convolutions are no layers", "y = Reshape(x, as3d) c = Conv(y, w3d, b) out = Relu(c)", ""),
    ("BatchMatMul is no layer", "y = MatMul(x, batch) out = Relu(y)", ""),
    ("MatMul of two activations is no layer", "y = MatMul(x, s) out = Relu(y)", ""),
    (
        "a plain Add on a bias-less conv is its bias add",
        "c = Conv(x, w) a = Add(c, s) out = Relu(a)",
        "w out",
    ),
    (
        "of two layers without biases an Add matches the first",
        "c = Conv(x, w) e = Conv(s, w2) a = Add(c, e) out = Relu(a)",
        "w out",
    ),
    ("a Clip to other bounds is no activation", f"{CONV} out = Clip(c, zero, three)", "w c"),
    ("a Clip to [0, infinity) is a Relu", f"{CONV} out = Clip(c, zero)", "w out"),
    ("dilations change nothing", "c = Conv<dilations=[2,2]>(x, w) out = Relu(c)", "w out"),
    ("R24 post-activation bypass", f"{CONV} r = Clip(c, zero, six) out = Add(r, s)", "w r out"),
    (
        "R33 Mul, Mul, Add after relu6",
        f"{CONV} r = Clip(c, zero, six) p = Mul(r, k) q = Mul(p, k) out = Add(q, s)",
        "w r p q out",
    ),
    ("R40 conv+Add+relu6", f"{CONV} a = Add(s, c) out = Clip(a, zero, six)", "w c out"),
    (
        "R41 depthwise+Add+relu6",
        "c = Conv<group=4, pads=[1,1,1,1]>(x, d, b) a = Add(c, s) out = Clip(a, zero, six)",
        "d c out",
    ),
    (
        "R42 separable, with Add and relu6",
        "e = Conv<group=4, pads=[1,1,1,1]>(x, d) c = Conv(e, w, b) a = Add(c, s) out = Clip(a, zero, six)",
        "d w e c out",
    ),
    ("R43 conv->relu6 without bias", "c = Conv(x, w) out = Clip(c, zero, six)", "w out"),
    ("R44 final BiasAdd", f"{CONV} r = Relu(c) f = Flatten<axis=3>(r) out = Gemm(f, m, mb)", "w r m out"),
    ("R45 post-activation Add", f"{CONV} r = Clip(c, zero, six) a = Add(s, r) out = Sigmoid(a)", "w r a"),
    (
        "R46 relu branch + linear conv branch + Add + relu6",
        f"{CONV} r = Clip(c, zero, six) e = Conv(r, w2, b2) a = Add(r, e) out = Clip(a, zero, six)",
        "w w2 r e out",
    ),
    (
        "R53 two depthwise convs",
        "c = Conv<group=4, pads=[1,1,1,1]>(x, d) r = Clip(c, zero, six) "
        "e = Conv<group=4, pads=[1,1,1,1]>(r, d2) out = Clip(e, zero, six)",
        "d d2 r out",
    ),
    (
        "pass (e) looks past MaxPool and Reshape",
        f"{CONV} r = Relu(c) p = MaxPool<kernel_shape=[1,1]>(r) f = Reshape(p, as1d) out = Mul(f, k)",
        "w r out",
    ),
    (
        "pass (e) looks past the reduction Max, not past elementwise Max",
        f"{CONV} r = Relu(c) p = ReduceMax(r) q = Max(r, s) t = Mul(q, k) u = Mul(p, k) out = Sub(t, u)",
        "w r u",
    ),
    ("pass (e) stops at other operators", f"{CONV} r = Relu(c) t = Sigmoid(r) out = Mul(t, k)", "w r"),
    ("an Add with a Relu and another reader", f"{CONV} a = Add(c, s) r = Relu(a) out = Sub(a, r)", "w c a r"),
    (
        "squeeze and excite",
        f"{CONV} r = Relu(c) p = GlobalAveragePool(r) e = Conv(p, w2, b2) g = Sigmoid(e) out = Mul(r, g)",
        "w w2 r e out",
    ),
]


@pytest.mark.parametrize(("rule", "body", "names"), RULES, ids=[rule for rule, *_ in RULES])
def test_rules(rule: str, body: str, names: str) -> None:
    assert placed(body) == set(names.split())


LAYERS = {
    "conv": ("y = Conv(x, w, b)", "w"),
    "fc": ("p = MatMul(x, m) y = Add(p, mb)", "m"),
    "depthwise": ("y = Conv<group=4, pads=[1,1,1,1]>(x, d, b)", "d"),
}
ACTIVATIONS = {"Relu6": "r = Clip({}, zero, six)", "Relu": "r = Relu({})"}


@pytest.mark.parametrize(
    ("layer", "activation", "bypass", "delay"),
    list(itertools.product(LAYERS, (*ACTIVATIONS, None), (False, True), (0, 5000))),
)
def test_r61_to_r63_layers_without_batch_norm(
    layer: str, activation: str | None, bypass: bool, delay: int
) -> None:
    """As the original's own 48 configurations, with no activation in the place of its Identity."""
    body, weight = LAYERS[layer]
    last = "y"
    if bypass:
        body, last = f"{body} a = Add(y, s)", "a"
    if activation is not None:
        body, last = f"{body} {ACTIVATIONS[activation].format(last)}", "r"
    model = model_of(f"{body} out = Softmax({last})")
    plan = place(model, Recipe(target="tf_contrib", quant_delay=delay))

    expected = {weight: "p_node" if layer == "fc" else "y_node", last: "out_node"}
    if bypass:
        expected["y"] = "a_node"
    assert {q.tensors[0].name: q.tensors[0].consumers for q in plan.quantizers} == {
        name: (reader,) for name, reader in expected.items()
    }
    assert {q.quant_delay for q in plan.quantizers} == {delay}
    require_idempotent(model, plan, TF_CONTRIB)


def require_idempotent(model: ir.Model, plan: Plan, recipe: Recipe) -> None:
    """R31."""
    insert(model, plan, ranges_of(model, plan))
    again = place(model, recipe)
    assert all(one.existing for one in again.quantizers)
    assert again.quantized_nodes == plan.quantized_nodes
    before = listing(model)
    insert(model, again, {})
    assert listing(model) == before


@settings(max_examples=100)
@given(networks())
def test_invariants_hold_on_random_networks(model: ir.Model) -> None:
    try:
        plan = place(model, TF_CONTRIB)
    except QatError:
        hypothesis.reject()
    require_invariants(model, plan)
    require_idempotent(model, plan, TF_CONTRIB)


def test_conv_quant_feeds_all_readers_of_the_bias_add() -> None:
    plan = place(model_of(f"{CONV} a = Add(c, s) r = Relu(a) g = Sigmoid(c) out = Sub(r, g)"), TF_CONTRIB)
    assert quantizer(plan, "c").tensors[0].consumers == ("a_node", "g_node")


def test_a_quantized_output_of_the_model_is_quantized() -> None:
    plan = place(model_of("out = Conv(x, w, b)"), TF_CONTRIB)
    assert quantizer(plan, "out").tensors[0].graph_output


def test_r38_a_shared_weight_has_one_quantizer_that_feeds_all_that_read_it() -> None:
    body = "c = Conv(x, w, b) r = Relu(c) e = Conv(r, w, b2) h = Sigmoid(e) g = Conv(h, w) out = Tanh(g)"
    plan = place(model_of(body), TF_CONTRIB)
    assert quantized(plan).count("w") == 1
    assert quantizer(plan, "w").tensors[0].consumers == ("c_node", "e_node", "g_node")
    assert plan.quantized_nodes == ("c_node", "e_node", "g_node")
    assert plan.skipped == ()


def test_a_shared_weight_takes_the_most_bits_of_its_layers() -> None:
    recipe = Recipe(target="tf_contrib", overrides=(Override(match="e_node", weight_bits=4),))
    plan = place(model_of(f"{CONV} r = Relu(c) e = Conv(r, w, b2) out = Sigmoid(e)"), recipe)
    assert quantizer(plan, "w").bits == 8


def test_a_weight_shared_along_two_axes_has_one_scale() -> None:
    body = "c = MatMul(x, m) r = Relu(c) e = MatMul(m, r) out = Relu(e)"
    plan = place(model_of(body), Recipe(target="tf_contrib", symmetric=True))
    assert quantizer(plan, "m").axis is None
    assert [one.node for one in plan.skipped] == ["c_node", "e_node"]
    assert all("along different axes" in one.reason for one in plan.skipped)


@pytest.mark.parametrize("symmetric", [False, True])
def test_symmetric_holds_for_weights_too_and_never_for_pass_e(symmetric: bool) -> None:
    recipe = Recipe(target="tf_contrib", symmetric=symmetric)
    body = f"{CONV} a = Add(c, s) r = Relu(a) p = Add(r, s) out = Mul(p, k)"
    ranges = {q.tensors[0].name: q.range for q in place(model_of(body), recipe).quantizers}
    wide = IntegerRange(-128, 127) if symmetric else IntegerRange(0, 255)
    assert ranges == {
        "w": IntegerRange(-127, 127) if symmetric else IntegerRange(1, 255),
        "c": wide,
        "r": wide,
        "p": wide,
        "out": IntegerRange(0, 255),
    }


def test_r27_r28_bits() -> None:
    recipe = Recipe(target="tf_contrib", weight_bits=4, activation_bits=5)
    body = f"{CONV} a = Add(c, s) r = Relu(a) p = Add(r, s) out = Mul(p, k)"
    plan = place(model_of(body), recipe)
    assert {q.tensors[0].name: q.bits for q in plan.quantizers} == {"w": 4, "c": 5, "r": 5, "p": 5, "out": 5}
    assert quantizer(plan, "w").range == IntegerRange(1, 15)


@pytest.mark.parametrize(
    ("symmetric", "per_channel", "axis"), [(True, True, 0), (True, False, None), (False, False, None)]
)
def test_symmetric_weights_are_per_channel_as_the_recipe_says(
    symmetric: bool, per_channel: bool, axis: int | None
) -> None:
    recipe = Recipe(target="tf_contrib", symmetric=symmetric, per_channel=per_channel)
    plan = place(model_of(f"{CONV} out = Relu(c)"), recipe)
    assert quantizer(plan, "w").axis == axis
    assert plan.skipped == ()


def test_asymmetric_weights_have_one_scale_and_the_plan_says_why() -> None:
    plan = place(model_of(f"{CONV} out = Relu(c)"), Recipe(target="tf_contrib"))
    assert quantizer(plan, "w").axis is None
    assert plan.quantized_nodes == ("c_node",)
    (note,) = plan.skipped
    assert note.node == "c_node"
    assert "no zero point per channel" in note.reason


@pytest.mark.parametrize(
    ("rule", "body", "names"),
    [
        (
            "R34 only s1",
            "[s1__conv] c = Conv(x, w, b) [s1__relu] r = Relu(c) "
            "[s2__conv] e = Conv(r, w2, b2) [s2__relu] out = Relu(e)",
            "w r",
        ),
        ("s1 is not s10", "[s1__conv] c = Conv(x, w, b) [s10__conv] out = Conv(c, w2, b2)", "w c"),
        ("an activation outside", "[s1__conv] c = Conv(x, w, b) [relu] out = Relu(c)", "w"),
        ("a layer outside", "[conv] c = Conv(x, w, b) [s1__relu] out = Relu(c)", "out"),
        (
            "a weight read from outside",
            "[s1__one] c = Conv(x, w, b) [two] out = Conv(c, w, b2)",
            "c",
        ),
        (
            "conv_quant inside",
            "[s1__conv] c = Conv(x, w, b) [s1__add] a = Add(c, s) [s1__relu] out = Relu(a)",
            "w c out",
        ),
        (
            "conv_quant read from outside",
            "[s1__conv] c = Conv(x, w, b) [add] a = Add(c, s) [s1__relu] out = Relu(a)",
            "w out",
        ),
        (
            "R36 pass (e) outside",
            "[s1__conv] c = Conv(x, w, b) [s1__relu] r = Relu(c) [mul] out = Mul(r, k)",
            "w r",
        ),
        (
            "pass (e) inside",
            "[s1__conv] c = Conv(x, w, b) [s1__relu] r = Relu(c) [s1__mul] out = Mul(r, k)",
            "w r out",
        ),
        (
            "pass (e) counts what the scope left out two steps before",
            "[s1__conv] c = Conv(x, w, b) [mul] p = Mul(c, k) [add] q = Add(p, s) [s1__two] out = Add(q, s)",
            "w c out",
        ),
    ],
)
def test_scope(rule: str, body: str, names: str) -> None:
    assert placed(body, Recipe(target="tf_contrib", scope="s1")) == set(names.split())


def test_r35_r37_r49_a_scope_that_matches_nothing_is_an_error() -> None:
    """TensorFlow did nothing, and said nothing."""
    with pytest.raises(QatError) as caught:
        place(model_of("out = Conv(x, w, b)"), Recipe(target="tf_contrib", scope="s1"))
    assert caught.value.code == ErrorCode.RECIPE_SCOPE_UNMATCHED


def test_an_excluded_node_is_out_of_scope() -> None:
    recipe = Recipe(target="tf_contrib", overrides=(Override(match="Relu", quantize=False),))
    assert placed(f"{CONV} r = Relu(c) out = Mul(r, k)", recipe) == {"w"}


# fq stands for a quantizer that the model came with.
@pytest.mark.parametrize(
    ("rule", "body", "new"),
    [
        ("R52 behind a Reshape", f"{CONV} r = Reshape(c, as1d) q = fq(r) out = Sigmoid(q)", "w"),
        ("R52 none", f"{CONV} r = Reshape(c, as1d) out = Sigmoid(r)", "w c"),
        ("on the activation", f"{CONV} r = Relu(c) q = fq(r) out = Sigmoid(q)", "w"),
        ("on the weight", "q = fq(w) c = Conv(x, q, b) out = Relu(c)", "out"),
        ("inside the pattern", f"{CONV} q = fq(c) a = Add(q, s) out = Relu(a)", "w out"),
        ("before pass (e)", f"q = fq(s) {CONV} a = Add(q, x) out = Sub(a, c)", "w c a"),
    ],
)
def test_what_has_a_quantizer_gets_no_second_one(rule: str, body: str, new: str) -> None:
    text = body.replace("fq(", "qat.FakeQuantize<qmin=0, qmax=255, on_grid=0>(")
    for tensor in ("r", "w", "c", "s"):
        text = text.replace(f">({tensor})", f">({tensor}, q_scale, q_zero_point)")
    model = graph(
        f"g (float[N,4,8,8] x, float[N,4,8,8] s) => (out) <{WEIGHTS}, float q_scale, uint8 q_zero_point> "
        f"{{ {text} }}",
        **VALUES,
        q_scale=np.float32(0.1),
        q_zero_point=np.uint8(3),
    )
    for node in model.graph:
        for output in node.outputs:
            output.type = ir.TensorType(ir.DataType.FLOAT)
    plan = place(model, TF_CONTRIB)
    assert {q.tensors[0].name for q in plan.quantizers if not q.existing} == set(new.split())
    assert sum(q.existing for q in plan.quantizers) == body.count("fq(")


@pytest.mark.parametrize(
    ("body", "op", "reason"),
    [
        ("c = Conv(x, w) n = Sigmoid(c)", "Conv", "it has no bias, and no activation"),
        ("n = ConvTranspose(x, w)", "ConvTranspose", "no transposed convolutions"),
        ("n = Conv(x, s)", "Conv", "its weight is not a constant"),
        ("n = MatMul(x, s)", "MatMul", "its weight is not a constant"),
        ("n = MatMul(x, batch)", "MatMul", "products with one matrix only, its weight has rank 3"),
        ("y = Reshape(x, as1d) n = Conv(y, w1d, b)", "Conv", "2-D convolutions only, its weight has rank 3"),
    ],
)
def test_what_is_left_out_is_said(body: str, op: str, reason: str) -> None:
    plan = place(model_of(f"{body} out = Conv(x, w2, b2)"), TF_CONTRIB)
    (found,) = plan.skipped
    assert found.op == op
    assert reason in found.reason
    assert plan.quantized_nodes == ("out_node",)


def test_reasons_of_scope_and_sharing() -> None:
    body = "[s1__one] c = Conv(x, w, b) [two] e = Conv(c, w, b2) [s1__three] out = Conv(e, w2, b2)"
    plan = place(model_of(body), Recipe(target="tf_contrib", scope="s1", per_channel=False))
    assert {one.node: one.reason for one in plan.skipped} == {
        "s1/one": "its weight 'w' is read by 'two' too, which is not to be quantized",
        "two": "outside the recipe's scope 's1'",
    }


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        # TensorFlow: resnet_v1_50 has 54 weights_quant, 54 act_quant and 16 conv_quant.
        ("light-resnet50", 54, {"Relu": 49, "Conv": 4 + 16, "Gemm": 1}),
        # Pre-activation: convolutions that only a Concat reads stay float.
        ("light-densenet121", 60, {"Relu": 59, "Conv": 1}),
        ("light-squeezenet", 26, {"Relu": 26}),
        # MobileNet-v3: 18 HardSwish, 9 squeeze-and-excites, 11 linear bottlenecks, 7 of them with a shortcut.
        (
            "ppocr2-cls",
            54,
            {"Conv": 18 + 9 + 11, "HardSwish": 18, "Relu": 6 + 9, "Mul": 9, "Add": 7, "Gemm": 1},
        ),
        ("mnist-conv", 3, {"Relu": 2, "Gemm": 1}),
        ("minilm-l3", 18, {"Add": 24, "Mul": 6}),
    ],
)
def test_real_models(
    real_model: Callable[[str], Path], name: str, weights: int, activations: dict[str, int]
) -> None:
    model = load(real_model(name))
    normalize(model)
    fold_batch_norms(model)
    plan = place(model, TF_CONTRIB)
    makers = {output.name: node.op_type for node in model.graph for output in node.outputs}
    kinds = Counter(makers.get(q.tensors[0].name, "weight") for q in plan.quantizers)
    assert kinds == {"weight": weights, **activations}
    require_invariants(model, plan)
    require_idempotent(model, plan, TF_CONTRIB)
