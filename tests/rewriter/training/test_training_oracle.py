"""Gradients of a real model beside those of generate_artifacts, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import stock
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.initializers import add_initializer
from rewriter.load import load
from rewriter.names import FreeNames
from rewriter.normalize import normalize
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts

SHAPE = (4, 3, 48, 64)


def for_the_oracle(model: ir.Model, scores: str) -> ir.Model:
    """The model up to its scores, in operators that generate_artifacts differentiates, of a fixed size."""
    graph, names = model.graph, FreeNames(model)
    for node in list(graph):
        if node.op_type in ("HardSwish", "HardSigmoid"):
            _write_out(graph, names, node)
    values = {output.name: output for node in graph for output in node.outputs}
    graph.outputs[:] = [values[scores]]
    graph.outputs[0].shape = ir.Shape([SHAPE[0], 2])
    graph.inputs[0].shape = ir.Shape(SHAPE)
    RemoveUnusedNodesPass()(model)
    for value in values.values():
        if value is not graph.outputs[0]:
            value.shape = None
    return model


def _write_out(graph: ir.Graph, names: FreeNames, node: ir.Node) -> None:
    """x * clip(alpha x + beta, 0, 1), or the second factor alone."""
    swish = node.op_type == "HardSwish"
    alpha = 1 / 6 if swish else node.attributes.get_float("alpha", 0.2)
    beta = 0.5 if swish else node.attributes.get_float("beta", 0.5)
    a, b, low, high = (
        add_initializer(graph, names.take(f"{node.name}_constant"), np.array(number, np.float32))
        for number in (alpha, beta, 0, 1)
    )
    x = node.inputs[0]
    product = ir.node("Mul", [x, a])
    total = ir.node("Add", [product.outputs[0], b])
    clipped = ir.node("Clip", [total.outputs[0], low, high])
    nodes = [product, total, clipped]
    if swish:
        nodes.append(ir.node("Mul", [x, clipped.outputs[0]]))
    for one in nodes:
        one.name = names.take(f"{node.name}_{one.op_type}")
        one.outputs[0].name = names.take(f"{one.name}_output")
        one.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]]
    )


def test_ppocr2_cls_has_the_gradients_of_generate_artifacts(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(real_model("ppocr2-cls"))
    normalize(model)
    fold_batch_norms(model)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    report = write_training_artifacts(model, Recipe(), ours)
    assert len(report.trainable) == 108  # 54 layers with a weight and a bias each
    oracle = for_the_oracle(model, report.attached_to)
    stock.generate_artifacts(oracle, theirs, trainable=list(report.trainable), frozen=[])
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal(SHAPE).astype(np.float32), rng.integers(0, 2, SHAPE[0])

    (loss, found), (stock_loss, expected) = (stock.gradients(folder, x, labels) for folder in (ours, theirs))

    np.testing.assert_allclose(loss, stock_loss, rtol=1e-6)
    assert found.keys() == expected.keys() == set(report.trainable)
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())
