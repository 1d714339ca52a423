"""Writes a graph as a list of calls that `benchmarks.torch_step` makes in PyTorch, where there is no ONNX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.recipe import GraphLoss, LossName
from rewriter.training.losses import attach_loss


def write_torch_program(
    model: ir.Model, loss: LossName | GraphLoss, trainable: Sequence[str], folder: Path
) -> None:
    """Write program.json and weights.npz.

    Args:
        model: a normalized model, with FakeQuantize nodes or without; changed.
        trainable: initializers to train; the scales of quantizers that act are trained too.
    """
    graph = model.graph
    value = attach_loss(model, loss).loss
    _fuse_gelu(graph)
    nodes, scales, zero_points = [], [], []
    for node in graph:
        op_type = node.op_type
        if fake_quantize.is_fake_quantize(node):
            quantizer = fake_quantize.read(node)
            if quantizer.on_grid:
                op_type = "Identity"
            else:
                scales.append(quantizer.scale.name)
                zero_points.append(quantizer.zero_point.name)
        inputs = [None if x is None else x.name for x in node.inputs]
        nodes.append(
            {
                "op": op_type,
                "inputs": inputs[:1] if op_type == "Identity" else inputs,
                "output": node.outputs[0].name,
                "attributes": {a.name: _plain(a) for a in node.attributes.values()},
            }
        )
    weights = {name: v.const_value.numpy() for name, v in graph.initializers.items() if v.const_value}
    quantizers = {*scales, *zero_points}
    weights.update((name, np.atleast_1d(weights[name])) for name in quantizers if name)
    np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
    program = {
        "nodes": nodes,
        "loss": value.name,
        "trainable": list(trainable),
        "scales": list(dict.fromkeys(scales)),
        "zero_points": list(dict.fromkeys(zero_points)),
    }
    (folder / "program.json").write_text(json.dumps(program))


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, list | tuple) else value


def _fuse_gelu(graph: ir.Graph) -> None:
    """x / 2 * (1 + erf(x / sqrt 2)) becomes the call that somebody writing PyTorch would make."""
    for erf in [node for node in graph if node.op_type == "Erf"]:
        divide = _producer(erf, "Div")
        add = _consumer(erf, "Add")
        product = _consumer(add, "Mul")
        half = _consumer(product, "Mul")
        if divide is None or half is None or product is None or divide.inputs[0] not in product.inputs:
            continue
        gelu = ir.node("Gelu", [divide.inputs[0]], outputs=[ir.Value(name=f"{half.outputs[0].name}_gelu")])
        assert add is not None
        graph.insert_after(half, gelu)
        half.outputs[0].replace_all_uses_with(gelu.outputs[0])
        for node in (half, product, add, erf, divide):
            graph.remove(node, safe=True)


def _producer(node: ir.Node, op_type: str) -> ir.Node | None:
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None


def _consumer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    consumers = [] if node is None else list(node.outputs[0].consumers())
    return consumers[0] if len(consumers) == 1 and consumers[0].op_type == op_type else None
