"""Merges a Mul and an Add by per-channel constants behind a batch norm into its gamma and beta.

    (gamma * n + beta) * a + b = (gamma * a) * n + (beta * a + b)

Rules:

1. The batch norm is in inference mode, with constant gamma and beta, and its result has one reader.
2. The other operand of that Mul or Add is a constant with one value, or with one per channel along axis 1.
3. Gamma and beta that other nodes read are copied.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import add_initializer, float64_array
from rewriter.names import FreeNames
from rewriter.operators import is_constant, is_operator


def merge_channel_scales(model: ir.Model, batch_norms: Iterable[ir.Node]) -> None:
    """Merge as long as one of `batch_norms` is followed by such a Mul or Add, in place."""
    names = FreeNames(model)
    for node in batch_norms:
        if node.graph is model.graph and not node.attributes.get_int("training_mode", 0):
            while _try_merge(node, model.graph, names):
                pass


def _try_merge(batch_norm: ir.Node, graph: ir.Graph, names: FreeNames) -> bool:
    gamma, beta = batch_norm.inputs[1:3]
    output = batch_norm.outputs[0]
    if gamma is None or beta is None or not (is_constant(gamma) and is_constant(beta)):
        return False
    if len(output.uses()) != 1 or output.is_graph_output():
        return False
    follower = next(iter(output.uses())).node
    if not is_operator(follower, "Mul", "Add") or follower.graph is not graph:
        return False
    constant = next((value for value in follower.inputs if is_constant(value)), None)
    per_channel = None if constant is None else _per_channel(constant, output, float64_array(gamma).size)
    if per_channel is None:
        return False

    if follower.op_type == "Mul":
        _replace(batch_norm, 1, float64_array(gamma) * per_channel, graph, names)
        _replace(batch_norm, 2, float64_array(beta) * per_channel, graph, names)
    else:
        _replace(batch_norm, 2, float64_array(beta) + per_channel, graph, names)
    old = follower.outputs[0]
    name = old.name if old.is_graph_output() else output.name
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(follower, safe=True)
    output.name = name
    if constant is not None and not constant.uses() and not constant.is_graph_output():
        graph.initializers.pop(constant.name or "", None)
    return True


def _per_channel(constant: ir.Value, x: ir.Value, channels: int) -> npt.NDArray[np.float64] | None:
    """The constant as one float64 value per channel of `x`, None where it varies along another axis."""
    array = float64_array(constant)
    if array.size == 1 and ((x.shape is not None and array.ndim <= len(x.shape)) or array.ndim == 0):
        return np.full(channels, array.reshape(()))
    if x.shape is None or array.ndim > len(x.shape):
        return None
    aligned = array.reshape([1] * (len(x.shape) - array.ndim) + list(array.shape))
    if aligned.ndim < 2 or aligned.shape[1] != channels or aligned.size != channels:
        return None
    return aligned.reshape(channels)


def _replace(
    batch_norm: ir.Node, index: int, array: npt.NDArray[np.float64], graph: ir.Graph, names: FreeNames
) -> None:
    old = batch_norm.inputs[index]
    assert old is not None
    values = array.astype(np.float32)
    if len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(values, name=old.name)
        return
    batch_norm.replace_input_with(index, add_initializer(graph, names.take(f"{old.name}_scaled"), values))
