"""Dequantizes anew in the backward pass, so that activations wait for it as integers.

A convolution's weight gradient and the gradient of a scale read the dequantized activation y. Of the forward
pass they take q in its place, a quarter of y's size, and a DequantizeLinear of their own, right before the
first of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from rewriter.names import FreeNames


def recompute_dequantized(graph: ir.Graph, loss: ir.Value, data: Iterable[ir.Value]) -> None:
    """Give the nodes behind that of the loss their own DequantizeLinear.

    Args:
        data: the graph inputs that are no parameters. What does not depend on them, weights, is kept.
    """
    names = FreeNames(graph)
    position = {node: index for index, node in enumerate(graph)}
    last = loss.producer()
    assert last is not None
    activations = _computed_of(data, graph)
    for node in list(graph):
        if node is last:
            break
        if node.op_type != "DequantizeLinear" or "axis" in node.attributes or node not in activations:
            continue
        y = node.outputs[0]
        if any(use.node not in position for use in y.uses()):
            continue  # the body of an If or Loop reads it
        backward = [use for use in y.uses() if position[use.node] > position[last]]
        if not backward:
            continue
        name = names.take(f"{y.name}_again")
        output = ir.Value(name=name, shape=y.shape, type=y.type)
        # Per tensor the axis means nothing. It keeps onnxruntime from seeing that the two nodes are the same.
        again = ir.node(
            "DequantizeLinear",
            node.inputs,
            {"axis": 0},
            outputs=[output],
            name=names.take(f"{name}_DequantizeLinear"),
        )
        graph.insert_before(min((use.node for use in backward), key=position.__getitem__), again)
        for use in backward:
            use.node.replace_input_with(use.idx, output)


def _computed_of(inputs: Iterable[ir.Value], graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on one of the inputs."""
    values = set(inputs)
    nodes: set[ir.Node] = set()
    for node in graph:
        if any(value is not None and value in values for value in node.inputs):
            nodes.add(node)
            values.update(node.outputs)
    return nodes
