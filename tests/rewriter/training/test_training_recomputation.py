"""No dequantized activation waits for the backward pass; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from rewriter.quantization import IntegerRange
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.recomputation import recompute_dequantized
from rewriter.training.runtime import open_session
from tests.rewriter.training import nets


def lowered(*, x_waits: bool) -> ir.Model:
    """A loss that reads a weight and an activation after it, and what a backward pass would read of both.

    `x_waits` says whether it reads the float activation too, as the gradient of a trained scale does.
    """
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (float[N,4] x, float[4] w) => (float loss, float[N,4] dx, float[N,4] dw, float[4] dv)
        <float s = {{0.5}}, uint8 z = {{3}}, float[4] t = {{1, 2, 3, 4}}, int8[4] zeros = {{0, 0, 0, 0}}> {{
            q = QuantizeLinear(x, s, z)
            y = DequantizeLinear(q, s, z)
            p = QuantizeLinear <axis = 0>(w, t, zeros)
            v = DequantizeLinear <axis = 0>(p, t, zeros)
            a = Mul(y, v)
            loss = ReduceSum <keepdims = 0>(a)
            dx = Sub(y, {"x" if x_waits else "v"})
            dw = Mul(y, y)
            dv = Neg(v)
        }}"""
    )
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph):
        node.name = f"node{index}"
    return model


def readers(graph: ir.Graph, name: str) -> list[str]:
    """Names of the outputs of the nodes that read the value."""
    return [
        node.outputs[0].name or "" for node in graph if name in [value.name for value in node.inputs if value]
    ]


def test_the_backward_pass_dequantizes_the_integers_again() -> None:
    graph = (model := lowered(x_waits=False)).graph
    recompute_dequantized(graph, graph.outputs[0], graph.inputs[:1])
    assert readers(graph, "y") == ["a"]
    assert readers(graph, "y_again") == ["dx", "dw"]
    assert readers(graph, "v") == ["a", "dx", "dv"]  # weights are kept
    assert readers(graph, "q") == ["y", "y_again"]
    order = [node.outputs[0].name for node in graph]
    assert order.index("y_again") == order.index("dx") - 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_where_the_float_activation_waits_the_integers_do_not() -> None:
    graph = (model := lowered(x_waits=True)).graph
    recompute_dequantized(graph, graph.outputs[0], graph.inputs[:1])
    assert readers(graph, "q") == ["y"]
    assert readers(graph, "q_again") == ["y_again"]
    assert readers(graph, "y_again") == ["dx", "dw"]
    order = [node.outputs[0].name for node in graph]
    assert order[-5:-2] == ["q_again", "y_again", "dx"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("x_waits", [False, True])
def test_the_numbers_stay(x_waits: bool) -> None:
    x, w = (np.random.default_rng(0).normal(0, 3, shape).astype(np.float32) for shape in ((5, 4), (4,)))
    results = []
    for recompute in (False, True):
        model = lowered(x_waits=x_waits)
        if recompute:
            recompute_dequantized(model.graph, model.graph.outputs[0], model.graph.inputs[:1])
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        results.append(session.run(None, {"x": x, "w": w}))
    for before, after in zip(*results, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("x_waits", [False, True])
def test_onnxruntime_does_not_merge_the_copies(tmp_path: Path, x_waits: bool) -> None:
    """It merges nodes that are the same; then activations would wait in float32."""
    model = lowered(x_waits=x_waits)
    recompute_dequantized(model.graph, model.graph.outputs[0], model.graph.inputs[:1])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert sum(n.op_type == "DequantizeLinear" and n.input[1] == "s" for n in optimized.graph.node) == 2
    quantized_x = [n for n in optimized.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "x"]
    assert len(quantized_x) == (2 if x_waits else 1)


def test_training_graphs_recompute_and_eval_graphs_do_not(tmp_path: Path) -> None:
    write_training_artifacts(nets.quantized_mlp(8), Recipe(), tmp_path)
    names = {
        name: [node.name for node in onnx.load(tmp_path / name).graph.node if "_again" in node.name]
        for name in ("training_model.onnx", "eval_model.onnx")
    }
    assert len(names["training_model.onnx"]) == 4  # QuantizeLinear and DequantizeLinear of x and r
    assert names["eval_model.onnx"] == []
    session = open_session(tmp_path)
    session.module.train()
    assert np.isfinite(session.module(*nets.batch()))


def test_weights_with_one_scale_are_not_dequantized_again(tmp_path: Path) -> None:
    """They are parameters, not data, though inputs of the training graph."""
    net = nets.mlp()
    for name, range_ in (("x", (0, 255)), ("W1", (-127, 127))):
        nets.quantize(net, name, IntegerRange(*range_), np.float32(0.05), 0)
    write_training_artifacts(net, Recipe(), tmp_path)
    again = [n.name for n in onnx.load(tmp_path / "training_model.onnx").graph.node if "_again" in n.name]
    assert len(again) == 2
    assert all(name.startswith("x_") for name in again)
