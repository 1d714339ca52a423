"""What is differentiated, what is refused, and how contributions add up."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from gradient_check import session

from rewriter.errors import ErrorCode, QatError
from rewriter.gradients import differentiate, trainability

HEADER = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1, "other" : 1]>\n'


def graph_of(text: str) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A graph in ONNX text form whose loss is called `loss`, and its values by name."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEADER + text)))
    graph = model.graph
    for i, node in enumerate(graph):
        node.name = f"{node.op_type}_{i}"
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    return model, {name: value for name, value in values.items() if name}


def gradients(text: str, wrt: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    model, values = graph_of(text)
    found = differentiate(model.graph, values["loss"], [values[name] for name in wrt])
    model.graph.outputs.extend(found[values[name]] for name in wrt)
    return list(session(ir.to_proto(model)).run([found[values[name]].name for name in wrt], feeds))


A = np.array([1.0, 2.0, 3.0], np.float32)


def test_contributions_of_several_consumers_are_summed() -> None:
    text = """g (float[3] a) => (float[] loss) {
        b = Exp(a) c = Sqrt(a) d = Add(b, c) loss = ReduceSum<keepdims=0>(d)
    }"""
    (two,) = gradients(text, ["a"], {"a": A})
    np.testing.assert_allclose(two, np.exp(A) + 0.5 / np.sqrt(A), rtol=1e-5)
    text = "g (float[3] a) => (float[] loss) { b = Mul(a, a) c = Mul(a, b) loss = ReduceSum<keepdims=0>(c) }"
    (three,) = gradients(text, ["a"], {"a": A})
    np.testing.assert_allclose(three, 3 * A**2, rtol=1e-6)


def test_each_gradient_is_a_value_of_its_own() -> None:
    """Both sides of an Add have the same gradient; a loss that is itself asked for has gradient 1."""
    text = "g (float[3] a, float[3] b) => (float[] loss) { c = Add(a, b) loss = ReduceSum<keepdims=0>(c) }"
    model, values = graph_of(text)
    found = differentiate(model.graph, values["loss"], [values["a"], values["b"], values["loss"]])
    assert len(set(found.values())) == 3
    assert all(gradient.producer() is not None for gradient in found.values())
    model.graph.outputs.extend(found.values())
    _, da, db, dloss = session(ir.to_proto(model)).run(None, {"a": A, "b": A})
    np.testing.assert_array_equal(da, np.ones(3))
    np.testing.assert_array_equal(db, np.ones(3))
    assert dloss == 1


def test_gradient_of_an_intermediate_value() -> None:
    text = "g (float[3] a) => (float[] loss) { b = Exp(a) c = Mul(b, b) loss = ReduceSum<keepdims=0>(c) }"
    db, da = gradients(text, ["b", "a"], {"a": A})
    np.testing.assert_allclose(db, 2 * np.exp(A), rtol=1e-6)
    np.testing.assert_allclose(da, 2 * np.exp(2 * A), rtol=1e-5)


def test_loss_may_be_a_vector_of_one() -> None:
    text = "g (float[3] a) => (float[1] loss) { loss = ReduceSum(a) }"
    np.testing.assert_array_equal(gradients(text, ["a"], {"a": A})[0], np.ones(3))


def test_only_nodes_between_parameters_and_loss_are_touched() -> None:
    """An operator without a rule is no obstacle before the parameter, beside it or after the loss."""
    text = """g (float[3] a, float[3] p) => (float[] loss, float[3] other) {
        x = other.Unknown(a) y = Mul(x, p) loss = ReduceSum<keepdims=0>(y) other = other.Unknown(p)
    }"""
    model, values = graph_of(text)
    assert trainability(model.graph, values["loss"], [values["p"]]).trainable == ("p",)
    before = [(node, tuple(node.inputs), len(node.outputs)) for node in model.graph]
    differentiate(model.graph, values["loss"], [values["p"]])
    nodes = list(model.graph)
    assert [(node, tuple(node.inputs), len(node.outputs)) for node in nodes[: len(before)]] == before
    assert all((node.name or "").startswith("gradient/") for node in nodes[len(before) :])


def test_names_of_gradient_nodes_and_values_are_new() -> None:
    text = "g (float[3] a) => (float[] loss) { b = Exp(a) loss = ReduceSum<keepdims=0>(b) }"
    model, values = graph_of(text)
    values["b"].name = "gradient/Exp_0/Mul_output"
    model.graph.node("Exp_0").name = "Exp_0"
    differentiate(model.graph, values["loss"], [values["a"]])
    names = [value.name for node in model.graph for value in node.outputs]
    names += [node.name for node in model.graph]
    assert len(names) == len(set(names))


REFUSED = {
    "no rule": "x = other.Unknown(p)",
    "no rule on one of two paths": "u = other.Unknown(p) x = Mul(u, p)",
    "no rule after a rule": "u = Exp(p) x = other.Unknown(u)",
    "a bound that is not constant": "m = ReduceMax<keepdims=0>(p) x = Clip(a, m)",
    "a second output": "y, m = LayerNormalization(p, a) x = Add(y, m)",
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_a_blocked_parameter_is_frozen_with_the_node_named(body: str) -> None:
    text = f"""g (float[3] a, float[3] p, float[3] q) => (float[] loss) {{
        {body} lx = ReduceSum<keepdims=0>(x) lq = ReduceSum<keepdims=0>(q) loss = Add(lx, lq)
    }}"""
    model, values = graph_of(text)
    decided = trainability(model.graph, values["loss"], [values["p"], values["q"]])
    assert decided.trainable == ("q",)
    blocking = {"other": "Unknown", "Clip": "Clip", "LayerN": "LayerNormalization"}
    op_type = next(op for key, op in blocking.items() if key in body)
    node = next(node for node in model.graph if node.op_type == op_type)
    assert repr(node.name) in decided.frozen["p"]
    assert op_type in decided.frozen["p"]
    count = len(list(model.graph))
    with pytest.raises(QatError) as raised:
        differentiate(model.graph, values["loss"], [values["q"], values["p"]])
    assert raised.value.code == ErrorCode.GRADIENT_UNSUPPORTED
    assert raised.value.node == node.name
    assert op_type in raised.value.message
    assert len(list(model.graph)) == count


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ('x = Conv<auto_pad="SAME_UPPER">(p, w)', "auto_pad"),
        ("x = ConvTranspose<output_shape=[7, 7]>(p, w)", "output_shape"),
        ("x = MaxPool<kernel_shape=[2, 2], storage_order=1>(p)", "storage_order"),
        ('x = AveragePool<kernel_shape=[2, 2], auto_pad="SAME_LOWER">(p)', "auto_pad"),
        ('x = Pad<mode="reflect">(p, pads)', "reflect"),
        ("x = MatMul(unknown, p)", "rank"),
        ("x = BatchNormalization<training_mode=1>(p, c, c, c, c)", "training_mode"),
        ("d = Cast<to=11>(p) e = Sigmoid(d) x = Cast<to=1>(e)", "data type"),
        ("r = Shape(unknown) x = Tile(unknown, r)", "rank"),
    ],
)
def test_a_form_that_a_rule_does_not_cover_is_refused(node: str, reason: str) -> None:
    text = f"""g (float[1,1,6,6] p, float[1,1,3,3] w, int64[8] pads, float[1] c, float unknown)
        => (float[] loss) {{
            q = Exp(p) {node} s = ReduceSum<keepdims=0>(x) t = ReduceSum<keepdims=0>(q) loss = Add(s, t)
        }}"""
    model, values = graph_of(text)
    values["unknown"].shape = None
    wrt = values["unknown" if "Tile" in node else "p"]
    with pytest.raises(QatError) as raised:
        differentiate(model.graph, values["loss"], [wrt])
    assert raised.value.code == ErrorCode.GRADIENT_UNSUPPORTED
    assert reason in raised.value.message


def test_a_parameter_read_by_a_subgraph_is_frozen() -> None:
    text = """g (float[3] p, bool c, float[3] q) => (float[] loss) {
        x = If (c) <
            then_branch = t () => (float[3] tx) { tx = Exp(p) },
            else_branch = e () => (float[3] ex) { ex = Identity(p) }
        >
        y = Mul(x, p) z = Mul(y, q) loss = ReduceSum<keepdims=0>(z)
    }"""
    model, values = graph_of(text)
    decided = trainability(model.graph, values["loss"], [values["p"], values["q"]])
    assert decided.trainable == ("q",)
    assert "If" in decided.frozen["p"]


def test_parameters_that_cannot_be_trained_say_why() -> None:
    text = """g (float[3] p, float[3] unused, int64[1] shape, float[3] rounded, double[3] wide)
    => (float[] loss) {
        r = Round(rounded) x = Mul(p, r) w = Cast<to=1>(wide) v = Mul(x, w) y = Reshape(v, shape)
        loss = ReduceSum<keepdims=0>(y) other = Exp(unused)
    }"""
    model, values = graph_of(text)
    names = ["shape", "p", "unused", "rounded", "wide"]
    decided = trainability(model.graph, values["loss"], [values[name] for name in names])
    assert decided.trainable == ("p",)
    assert "INT64" in decided.frozen["shape"]
    assert "DOUBLE" in decided.frozen["wide"]
    assert "does not depend" in decided.frozen["unused"]
    assert "does not depend" in decided.frozen["rounded"]


def test_nothing_left_to_train_is_an_error() -> None:
    model, values = graph_of(
        "g (float[3] p) => (float[] loss) { x = other.Unknown(p) loss = ReduceSum<keepdims=0>(x) }"
    )
    with pytest.raises(QatError) as raised:
        trainability(model.graph, values["loss"], [values["p"]])
    assert raised.value.code == ErrorCode.NOTHING_TO_TRAIN
    assert "Unknown" in raised.value.message
    with pytest.raises(QatError) as raised:
        trainability(model.graph, values["loss"], [])
    assert raised.value.code == ErrorCode.NOTHING_TO_TRAIN


def test_a_loss_of_several_elements_is_refused() -> None:
    model, values = graph_of("g (float[3] p) => (float[3] loss) { loss = Exp(p) }")
    with pytest.raises(QatError) as raised:
        differentiate(model.graph, values["loss"], [values["p"]])
    assert raised.value.code == ErrorCode.LOSS_INVALID


@pytest.mark.parametrize("stop", ["Shape", "Size", "ArgMax", "NonZero", "cast", "Greater"])
def test_gradient_stops_at_integers_and_truth_values(stop: str) -> None:
    """What is computed from a tensor's shape or from comparisons adds nothing to its gradient."""
    body = {
        "Shape": "i = Shape(a) s = Cast<to=1>(i)",
        "Size": "i = Size(a) s = Cast<to=1>(i)",
        "ArgMax": "i = ArgMax(a) s = Cast<to=1>(i)",
        "NonZero": "i = NonZero(a) j = ReduceMax<keepdims=0>(i) s = Cast<to=1>(j)",
        "cast": "i = Cast<to=6>(a) s = Cast<to=1>(i)",
        "Greater": "i = Greater(a, b) s = Cast<to=1>(i)",
    }[stop]
    text = f"""g (float[3] a, float[3] b) => (float[] loss) {{
        {body} x = Mul(a, s) loss = ReduceSum<keepdims=0>(x)
    }}"""
    above_one = np.array([0, 1, 1])
    factor = {"Shape": 3, "Size": 3, "ArgMax": 2, "NonZero": 2, "cast": A, "Greater": above_one}[stop]
    (gradient,) = gradients(text, ["a"], {"a": A, "b": np.array([1, 1, 1], np.float32)})
    np.testing.assert_array_equal(gradient, np.broadcast_to(factor, 3))


def test_cast_between_floating_point_types_is_differentiated() -> None:
    text = """g (float[3] a) => (float[] loss) {
        d = Cast<to=11>(a) e = Exp(d) f = Mul(e, d) b = Cast<to=1>(f) loss = ReduceSum<keepdims=0>(b)
    }"""
    (gradient,) = gradients(text, ["a"], {"a": A})
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, np.exp(A) * (A + 1), rtol=1e-6)


def test_ties_share_the_gradient() -> None:
    tied = np.array([2.0, 2.0, 1.0], np.float32)
    text = "g (float[3] a) => (float[] loss) { loss = ReduceMax<keepdims=0>(a) }"
    np.testing.assert_array_equal(gradients(text, ["a"], {"a": tied})[0], [0.5, 0.5, 0])
    text = "g (float[3] a, float[3] b) => (float[] loss) { c = Max(a, b) loss = ReduceSum<keepdims=0>(c) }"
    da, db = gradients(text, ["a", "b"], {"a": tied, "b": np.array([2, 1, 3], np.float32)})
    np.testing.assert_array_equal(da, [0.5, 1, 0])
    np.testing.assert_array_equal(db, [0.5, 0, 1])


def test_time_is_linear_in_the_number_of_nodes() -> None:
    """In a chain whose every value has two consumers: ten times the nodes, not a hundred times the time."""

    def seconds(length: int) -> float:
        x = ir.val("x0", ir.DataType.FLOAT, [3])
        nodes, value = [], x
        for i in range(length):
            exp = ir.node("Tanh", [value], name=f"t{i}")
            exp.outputs[0].name = f"t{i}_out"
            add = ir.node("Add", [value, exp.outputs[0]], name=f"a{i}")
            add.outputs[0].name = f"x{i + 1}"
            nodes += [exp, add]
            value = add.outputs[0]
        total = ir.node("ReduceSum", [value], {"keepdims": 0}, name="total")
        total.outputs[0].name = "loss"
        graph = ir.Graph([x], total.outputs, nodes=[*nodes, total], opset_imports={"": 18})
        start = time.process_time()
        differentiate(graph, total.outputs[0], [x])
        return time.process_time() - start

    short = min(seconds(300) for _ in range(3))
    assert seconds(3000) < 40 * short
