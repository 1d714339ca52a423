"""Reads a constant that stands in the graph as arithmetic on initializers, such as a saturation bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.operators import is_operator

_MAX_DEPTH = 4


def bound_array(value: ir.Value | None, depth: int = _MAX_DEPTH) -> npt.NDArray[Any] | None:
    """The value of an initializer, or of Mul and Reshape of initializers; None for anything else."""
    array = constant_array(value)
    if array is not None or value is None:
        return array
    node = value.producer()
    if depth == 0 or node is None or not is_operator(node, "Mul", "Reshape"):
        return None
    operands = [bound_array(operand, depth - 1) for operand in node.inputs]
    if len(operands) != 2 or operands[0] is None or operands[1] is None:
        return None
    try:
        if node.op_type == "Reshape":
            return operands[0].reshape([int(size) for size in operands[1]])
        # A bound is no larger than its operands; a model could ask for an outer product of any size.
        if np.broadcast(operands[0], operands[1]).size > max(operands[0].size, operands[1].size):
            return None
        product: npt.NDArray[Any] = np.multiply(operands[0], operands[1])
    except ValueError:
        return None
    return product
