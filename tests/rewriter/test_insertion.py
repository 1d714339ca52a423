"""Insertion does what the plan says, and nothing else. (Whole graphs: placement/golden.)"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.insertion import insert
from rewriter.lowering import lower
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.quantization import IntegerRange as Range
from rewriter.quantization import Plan, QuantizedTensor, Quantizer, QuantizerParameters, dequantize, quantize
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph, listing, quantized, ranges_of, run


def plan_for(tensor: QuantizedTensor, axis: int | None = None) -> tuple[Plan, dict[str, QuantizerParameters]]:
    quantizer = Quantizer("q", "activation", 8, Range(0, 255), False, axis, (tensor,))
    parameters = QuantizerParameters(np.float32(0.1).reshape(()), np.uint8(7).reshape(()), "test")
    return Plan((quantizer,), (), ()), {"q": parameters}


def test_only_planned_consumers_read_the_quantized_tensor() -> None:
    model = graph("g (float[N,4] x) => (y, z) { [a] y = Relu(x) [b] z = Tanh(x) }")
    insert(model, *plan_for(QuantizedTensor("x", ("b",))))
    assert listing(model) == "y = Relu(x)\nx_fake_quantized = FQ(x by q_scale)\nz = Tanh(x_fake_quantized)"


def test_every_input_of_a_consumer_is_replaced() -> None:
    model = graph("g (float[N,4] x) => (y) { [a] y = Mul(x, x) }")
    insert(model, *plan_for(QuantizedTensor("x", ("a",))))
    assert listing(model).endswith("y = Mul(x_fake_quantized, x_fake_quantized)")


@pytest.mark.parametrize("graph_output", [False, True])
def test_an_output_of_the_graph_keeps_its_name(graph_output: bool) -> None:
    model = graph("g (float[N,4] x) => (y, z) { [a] y = Relu(x) [b] z = Tanh(y) }")
    insert(model, *plan_for(QuantizedTensor("y", ("b",), graph_output=graph_output)))
    assert [output.name for output in model.graph.outputs] == ["y", "z"]
    assert (model.graph.outputs[0].producer().op_type == "FakeQuantize") == graph_output
    lower(model, saturation="before")
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    y, z = run(model, x=x)
    scale, zero_point = np.float32(0.1), np.array(7, np.uint8)
    relu = np.maximum(x, 0)
    on_grid = dequantize(quantize(relu, scale, zero_point, Range(0, 255)), scale, zero_point)
    np.testing.assert_array_equal(y, on_grid if graph_output else relu)
    np.testing.assert_allclose(z, np.tanh(on_grid), rtol=1e-6)


def test_new_names_are_free_in_the_whole_model() -> None:
    model = graph(
        "g (float[N,4] x, float[N,4] x_fake_quantized) => (y, z) "
        "{ [x_fake_quantize] y = Relu(x) [b] z = Tanh(x_fake_quantized) }"
    )
    insert(model, *plan_for(QuantizedTensor("x", ("x_fake_quantize",))))
    names = [node.name for node in model.graph] + [o.name for node in model.graph for o in node.outputs]
    assert len({*names, "x", "x_fake_quantized"}) == len(names) + 2


def test_a_consumer_in_a_body_reads_it_too() -> None:
    model = graph(
        "g (float[N,4] x, bool c) => (y) { [if] y = If(c) "
        "<then_branch = t () => (float[N,4] u) { [inner] u = Tanh(x) }, "
        "else_branch = e () => (float[N,4] v) { v = Relu(x) }> }"
    )
    insert(model, *plan_for(QuantizedTensor("x", ("inner",))))
    lower(model, saturation="before")
    x = np.full((1, 4), 0.26, np.float32)
    np.testing.assert_allclose(run(model, x=x, c=np.array(True))[0], np.tanh(np.float32(0.3)), rtol=1e-5)
    np.testing.assert_allclose(run(model, x=x, c=np.array(False))[0], 0.26)


def test_unnamed_nodes_after_normalization() -> None:
    model = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2> "
        "{ a = Conv(x, w1) b = Relu(a) y = Conv(b, w2) }"
    )
    for node in model.graph:
        node.name = ""
    normalize(model)
    plan = quantized(model)
    assert len(set(plan.quantized_nodes)) == 2
    assert [line.split(" = ")[1].split("(")[0] for line in listing(model).splitlines()] == [
        "FQ", "FQ", "Conv", "Relu", "FQ", "FQ", "Conv", "FQ",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_parameters_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = graph("g (float[N,4] x) => (y) { [a] y = Relu(x) }")
    plan, parameters = plan_for(QuantizedTensor("x", ("a",)))
    parameters["q"] = dataclasses.replace(parameters["q"], scale=np.ones(shape, np.float32))
    with pytest.raises(ValueError, match="'q'"):
        insert(model, plan, parameters)


def test_a_missing_quantizer_is_added_beside_existing_ones() -> None:
    """The second convolution and the pooled tensor came without; the first keeps its scales."""
    model = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2> "
        "{ [a] a = Conv(x, w1) [p] p = MaxPool<kernel_shape=[2,2]>(a) [b] y = Conv(p, w2) }"
    )
    first = place(model, Recipe())
    kept = tuple(one for one in first.quantizers if one.name in ("x", "w1"))
    a = next(one for one in first.quantizers if one.name == "a")
    kept += (dataclasses.replace(a, tensors=a.tensors[:1]),)
    insert(model, dataclasses.replace(first, quantizers=kept), ranges_of(model, first))
    second = place(model, Recipe())
    assert [(one.name, one.existing) for one in second.quantizers] == [
        ("x", True), ("w1", True), ("a", True), ("w2", False), ("y", False),
    ]  # fmt: skip
    insert(model, second, ranges_of(model, second))

    at_once = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2> "
        "{ [a] a = Conv(x, w1) [p] p = MaxPool<kernel_shape=[2,2]>(a) [b] y = Conv(p, w2) }"
    )
    quantized(at_once)
    assert listing(model) == listing(at_once)


def test_the_model_stays_valid() -> None:
    model = graph("g (float[N,4] x) => (y) <float[4,4] w> { y = MatMul(x, w) }")
    quantized(model)
    assert set(model.graph.initializers) == {
        "w", "x_scale", "x_zero_point", "w_scale", "w_zero_point",
    }  # fmt: skip
    assert ir.to_proto(model).graph.node[0].op_type == "FakeQuantize"
