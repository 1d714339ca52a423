"""Which tensors carry what the model computes, and which operators form one function of a single tensor.

Both are found in one walk over the nodes in graph order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from rewriter.operators import is_constant, is_operator, traits_of, unquantized

_IMAGE_TYPES = (ir.DataType.UINT8, ir.DataType.INT8)


@dataclasses.dataclass(frozen=True)
class Signals:
    """Facts about the values of a graph.

    Attributes:
        carried: float tensors computed from the model's float inputs (or 8-bit images, or embedding tables).
            Attention masks, position tables and shape arithmetic are not among them: they are made from
            integers and constants, and rounding them to a grid breaks the model.
        composite: Add and Mul nodes whose operands are pointwise functions (or statistics) of one and the
            same tensor: a part of GELU, SiLU, HardSwish, Mish or a normalization.
        softmax_sums: Add nodes whose result only goes through shape changes into a Softmax.
    """

    carried: frozenset[ir.Value]
    composite: frozenset[ir.Node]
    softmax_sums: frozenset[ir.Node]


def find_signals(graph: ir.Graph) -> Signals:
    """Walk the graph (sorted topologically) once."""
    carried = {value for value in graph.inputs if _is_float(value) or value.dtype in _IMAGE_TYPES}
    roots: dict[ir.Value, ir.Value] = {}
    composite: set[ir.Node] = set()
    softmax_sums: set[ir.Node] = set()
    for node in graph:
        if _carries(node, carried):
            carried.update(output for output in node.outputs if _is_float(output))
        root = _common_root(node, roots)
        if root is not None:
            roots.update((output, root) for output in node.outputs)
            if is_operator(node, "Add", "Mul") and not _has_constant(node):
                composite.add(node)
        if is_operator(node, "Softmax") and (add := _sum_before(node)) is not None:
            softmax_sums.add(add)
    return Signals(frozenset(carried), frozenset(composite), frozenset(softmax_sums))


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _carries(node: ir.Node, carried: set[ir.Value]) -> bool:
    if is_operator(node, "Shape", "Size"):
        return False
    if is_operator(node, "Gather"):
        # An embedding: a float table indexed by tokens. A vector of numbers is a position table.
        table = node.inputs[0]
        if table is not None and is_constant(unquantized(table)):
            return _is_float(table) and table.shape is not None and len(table.shape) > 1
    return any(value in carried for value in _read_values(node))


def _read_values(node: ir.Node) -> Iterator[ir.Value]:
    """The node's inputs, and what its bodies (of an If, Loop or Scan) read."""
    yield from (value for value in node.inputs if value is not None)
    for body in _bodies(node):
        yield from body.outputs
        for inner in body:
            yield from _read_values(inner)


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _common_root(node: ir.Node, roots: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """The one tensor that the node's operands are pointwise functions or statistics of."""
    traits = traits_of(node)
    if traits is None or traits.kind not in ("arithmetic", "pointwise", "reduction"):
        return None
    inputs = node.inputs[:1] if traits.kind == "reduction" else node.inputs
    # Past quantizers, so that a model that has them is read as it was before.
    operands = (unquantized(value) for value in inputs if value is not None)
    found = {roots.get(value, value) for value in operands if not is_constant(value)}
    return found.pop() if len(found) == 1 else None


def _has_constant(node: ir.Node) -> bool:
    return any(value is not None and is_constant(unquantized(value)) for value in node.inputs)


def _sum_before(softmax: ir.Node) -> ir.Node | None:
    """The Add of two tensors that a Softmax reads, through operators that change its values little."""
    value = softmax.inputs[0]
    while value is not None and (node := unquantized(value).producer()) is not None:
        if is_operator(node, "Add"):
            return None if _has_constant(node) else node
        traits = traits_of(node)
        if traits is None or not (
            traits.kind == "movement" or is_operator(node, "Cast", "Clip", "Max", "Min")
        ):
            return None
        value = node.inputs[0]
    return None
