"""Initializers that passes add."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """A new initializer of `graph` with the values of `array`; `name` is made unique among initializers."""
    unique, suffix = name, 0
    while unique in graph.initializers:
        suffix += 1
        unique = f"{name}_{suffix}"
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def constant_of(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The values of an initializer or of a Constant node's output, or None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    array: npt.NDArray[np.generic] = tensor.numpy()
    return array


def owning_graph(node: ir.Node) -> ir.Graph:
    """The graph that `node` stands in (functions are inlined, so that it is not a function)."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph
