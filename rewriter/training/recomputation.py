"""Quantizes anew in the backward pass, so that no dequantized activation waits for it.

A convolution's weight gradient and the gradient of a scale read the dequantized activation y. They take a
copy that is made right before the first of them: by DequantizeLinear from the integers q, a quarter of y's
size, or, where the backward pass reads the float activation x as well, by QuantizeLinear and
DequantizeLinear from that, and nothing but x waits. (With fewer than 8 bits a Clip stands before
QuantizeLinear, and the integers wait beside x. What a gate chooses, and more than 8 bits, waits in float32.)
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from rewriter.names import FreeNames


def recompute_dequantized(graph: ir.Graph, loss: ir.Value, data: Iterable[ir.Value]) -> None:
    """Give the nodes behind that of the loss their own dequantized activations.

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
        first = min((use.node for use in backward), key=position.__getitem__)
        q = node.inputs[0]
        assert q is not None
        quantize = q.producer()
        if quantize is not None and _waits(quantize, position, last):
            q = _copy(quantize, quantize.inputs[0], first, graph, names)
        again = _copy(node, q, first, graph, names)
        for use in backward:
            use.node.replace_input_with(use.idx, again)


def _waits(quantize: ir.Node, position: dict[ir.Node, int], last: ir.Node) -> bool:
    """Whether the backward pass reads what the QuantizeLinear reads."""
    x = quantize.inputs[0]
    if quantize.op_type != "QuantizeLinear" or x is None:
        return False
    return any(position.get(use.node, -1) > position[last] for use in x.uses())


def _copy(
    node: ir.Node, data: ir.Value | None, before: ir.Node, graph: ir.Graph, names: FreeNames
) -> ir.Value:
    """The output of a copy of the node that reads `data`.

    Per tensor the axis means nothing. It keeps onnxruntime from seeing that the two nodes are the same.
    """
    output = node.outputs[0]
    name = names.take(f"{output.name}_again")
    value = ir.Value(name=name, shape=output.shape, type=output.type)
    inputs = [data, *node.inputs[1:]]
    copy = ir.node(
        node.op_type, inputs, {"axis": 0}, outputs=[value], name=names.take(f"{name}_{node.op_type}")
    )
    graph.insert_before(before, copy)
    return value


def _computed_of(inputs: Iterable[ir.Value], graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on one of the inputs."""
    values = set(inputs)
    nodes: set[ir.Node] = set()
    for node in graph:
        if any(value is not None and value in values for value in node.inputs):
            nodes.add(node)
            values.update(node.outputs)
    return nodes
