"""What holds for every model, on random graphs and on real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.fake_quantize import is_fake_quantize, read
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.insertion import insert
from rewriter.load import load
from rewriter.normalize import normalize
from rewriter.operators import traits_of
from rewriter.placement import place
from rewriter.quantization import Plan
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph, listing, ranges_of

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Steps of a random network on [N,4,6,6] tensors; {a} and {b} are earlier tensors, {w} weights.
STEPS = (
    "Conv<pads=[1,1,1,1]>({a}, w3)",
    "Conv<group=4, pads=[1,1,1,1]>({a}, wd)",
    "ConvTranspose<pads=[1,1,1,1]>({a}, w3)",
    "MatMul({a}, w66)",
    "MatMul(w66, {a})",
    "MatMul({a}, {b})",
    "Conv({a}, {b})",
    "Add({a}, {b})",
    "Add({a}, {a})",
    "Add({a}, c)",
    "Mul({a}, {b})",
    "Relu({a})",
    "Clip({a}, zero, one)",
    "Sigmoid({a})",
    "Softmax({a})",
    "Transpose<perm=[0,1,3,2]>({a})",
    "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({a})",
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>({a})",
    "Identity({a})",
    "Add({a}, mask)",
)


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    tensors, lines = ["x", "first"], ["first = Conv<pads=[1,1,1,1]>(x, w3)"]
    for index in range(draw(st.integers(1, 12))):
        step = draw(st.sampled_from(STEPS))
        if step == "Conv({a}, {b})":
            step = "Conv({a}, wf)"  # a weight that is an activation
        a, b = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        if draw(st.integers(0, 5)) == 0:
            lines.append(f"j{index} = Concat<axis=1>({a}, {b})")
            lines.append(f"t{index} = Slice(j{index}, starts, ends, axes)")
        else:
            lines.append(f"t{index} = {step.format(a=a, b=b)}")
        tensors.append(f"t{index}")
    outputs = ", ".join({tensors[-1]: None, draw(st.sampled_from(tensors[1:])): None})
    return graph(
        f"g (float[N,4,6,6] x, int64[N,1,1,6] ids) => ({outputs}) "
        "<float[4,4,3,3] w3, float[4,1,3,3] wd, float[6,6] w66, float[4,1,1] c, float zero, float one, "
        "float[4,4,1,1] wr, int64[1] starts, int64[1] ends, int64[1] axes> "
        f"{{ mask = Cast<to=1>(ids) wf = Sigmoid(wr) {' '.join(lines)} }}",
        zero=np.float32(0),
        one=np.float32(1),
        starts=np.array([2]),
        ends=np.array([6]),
        axes=np.array([1]),
    )


@settings(max_examples=150)
@given(networks(), st.booleans())
def test_invariants_hold_on_random_networks(model: ir.Model, symmetric: bool) -> None:
    recipe = Recipe(symmetric=symmetric)
    plan = place(model, recipe)
    require_invariants(model, plan)
    require_invariants_after_insertion(model, plan)
    again = place(model, recipe)
    assert all(one.existing for one in again.quantizers)
    assert again.quantized_nodes == plan.quantized_nodes
    before = listing(model)
    insert(model, again, {})
    assert listing(model) == before


def require_invariants(model: ir.Model, plan: Plan) -> None:
    nodes = {node.name: node for node in model.graph.all_nodes()}
    values = {v.name: v for v in (*model.graph.inputs, *model.graph.initializers.values())}
    values.update({output.name: output for node in model.graph for output in node.outputs})

    accounted = {*plan.quantized_nodes, *(one.node for one in plan.skipped)}
    assert {name for name, node in nodes.items() if node.op_type in LAYERS} <= accounted

    assert len({one.name for one in plan.quantizers}) == len(plan.quantizers)
    activations = [t.name for one in plan.quantizers if one.kind == "activation" for t in one.tensors]
    assert [name for name, count in Counter(activations).items() if count > 1] == []
    for quantizer in plan.quantizers:
        assert quantizer.scale_name not in values
        assert quantizer.zero_point_name not in values
        assert any(not tensor.on_grid for tensor in quantizer.tensors)
        for tensor in quantizer.tensors:
            value = values[tensor.name]
            assert value.dtype == ir.DataType.FLOAT
            assert (value.const_value is not None) == (quantizer.kind == "weight")
            readers = {use.node.name for use in value.uses()}
            assert set(tensor.consumers) <= readers
            assert tensor.consumers or tensor.graph_output or quantizer.kind == "activation"


def require_invariants_after_insertion(model: ir.Model, plan: Plan) -> None:
    outputs = [output.name for output in model.graph.outputs]
    insert(model, plan, ranges_of(model, plan))
    assert [output.name for output in model.graph.outputs] == outputs
    proto = ir.to_proto(model)
    proto.opset_import.append(onnx.helper.make_opsetid("qat", 1))
    for node in model.graph:
        if is_fake_quantize(node):
            assert not is_fake_quantize(read(node).x.producer()), "a second layer of quantizers"
    quantized = set(plan.quantized_nodes)
    for node in model.graph:
        traits = traits_of(node)
        if node.name in quantized and traits is not None:
            # Everything but the bias comes from a quantizer.
            operands = [v for i, v in enumerate(node.inputs) if v is not None and i != traits.bias]
            assert all(is_fake_quantize(value.producer()) for value in operands), listing(model)


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("mnist-conv", {"Conv": 2, "Gemm": 1}),
        ("ppocr2-cls", {"Conv": 53, "Gemm": 1, "GlobalAveragePool": 10, "Mul": 9, "Add": 7}),
        ("light-resnet50", {"Conv": 53, "Gemm": 1, "Add": 16, "AveragePool": 1}),
        ("light-densenet121", {"Conv": 121, "AveragePool": 3, "GlobalAveragePool": 1}),
        ("light-shufflenet", {"Conv": 49, "Gemm": 1, "Add": 13, "AveragePool": 4}),
        ("light-squeezenet", {"Conv": 26, "GlobalAveragePool": 1}),
        ("minilm-l3", {"MatMul": 24}),
        ("qonnx-resblock", {"Conv": 3, "Add": 1}),
    ],
)
def test_real_models(real_model: Callable[[str], Path], name: str, quantized: dict[str, int]) -> None:
    model = load(real_model(name))
    normalize(model)
    fold_batch_norms(model)
    plan = place(model, Recipe())
    op_types = {node.name: node.op_type for node in model.graph}
    assert Counter(op_types[node] for node in plan.quantized_nodes) == quantized
    require_invariants(model, plan)
    require_invariants_after_insertion(model, plan)


def test_layers_in_a_body_are_listed() -> None:
    model = graph(
        "g (float[N,4] x, bool c) => (y, z) <float[4,4] w> { z = MatMul(x, w) y = If(c) "
        "<then_branch = t () => (float[N,4] u) { [inner] u = MatMul(x, w) }, "
        "else_branch = e () => (float[N,4] v) { v = Relu(x) }> }"
    )
    plan = place(model, Recipe())
    require_invariants(model, plan)
    assert [(one.node, one.reason) for one in plan.skipped] == [
        ("inner", "inside the body of an If, Loop or Scan")
    ]


# The node in question is called n; z makes sure that something can be quantized.
@pytest.mark.parametrize(
    ("inputs", "weights", "body", "reason"),
    [
        ("float[N,4] x, float[4,4] v", "", "[n] y = Gemm(x, v)", "its weight is not a constant"),
        ("float[N,4] x, float[4] b", "", "[n] y = Gemm(x, w, b)", "its bias is not a constant"),
        ("float[N,4] x, float16[N,4] h", ", float16[4,4] v", "[n] y = MatMul(h, v)", "float16"),
        (
            "float[N,4] x, int64[N,4] p",
            "",
            "f = Cast<to=1>(p) [n] y = MatMul(f, w)",
            "computed from integers",
        ),
        (
            "float[N,4] x",
            "",
            "q, s, p = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, p) [n] y = MatMul(d, w)",
            "quantized in the model already",
        ),
    ],
)
def test_reasons_against_a_layer(inputs: str, weights: str, body: str, reason: str) -> None:
    model = graph(f"g ({inputs}) => (y, z) <float[4,4] w{weights}> {{ {body} z = MatMul(x, w) }}")
    plan = place(model, Recipe())
    (found,) = [one for one in plan.skipped if one.node == "n"]
    assert reason in found.reason
    assert "n" not in plan.quantized_nodes
