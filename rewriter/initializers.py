"""Constants of a graph: how passes add them and how they read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def add_initializer(
    graph: ir.Graph, name: str, values: npt.NDArray[np.generic] | ir.TensorProtocol
) -> ir.Value:
    """A new initializer of `graph`, with the type and shape of `values`.

    Args:
        name: free in the whole model (`rewriter.names.FreeNames`).
        values: a tensor is taken as it is, without reading it; it gets the name.
    """
    tensor = ir.tensor(np.asarray(values)) if isinstance(values, np.ndarray | np.generic) else values
    tensor.name = name
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def constant_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The values of an initializer, or of a Constant node's output; None for anything else.

    An initializer that is also a graph input is no constant: a caller can replace it. Nor are strings.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def initializer_array(value: ir.Value | None) -> npt.NDArray[Any]:
    """The values of what is known to be an initializer."""
    array = constant_array(value)
    assert array is not None
    return array


def float64_array(value: ir.Value | None) -> npt.NDArray[np.float64]:
    """The same in float64: a copy."""
    return initializer_array(value).astype(np.float64)


def replace_initializer(graph: ir.Graph, value: ir.Value) -> None:
    """Take the initializer out of the graph, and its name from it: a computed value gets it."""
    del graph.initializers[value.name or ""]
    value.const_value = None
    value.name = None
