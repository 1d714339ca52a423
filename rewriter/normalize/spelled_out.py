"""Reads a quantizer of more than 8 bits back from the operators that `rewriter.lowering` spells it out in.

y = (clip(round(x / s) + z, qmin, qmax) - z) * s            without z where it is 0; s and z constant
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.normalize.constant_bounds import bound_array
from rewriter.normalize.quantization_grid import Grid, optional_input
from rewriter.operators import is_operator
from rewriter.quantization import IntegerRange


@dataclasses.dataclass(frozen=True)
class SpelledOut:
    """A per-tensor quantizer in single operators.

    Attributes:
        zero_point: its integer initializer; None where the arithmetic leaves it out, being 0.
        nodes: the operators, from the division to the last product.
    """

    x: ir.Value
    grid: Grid
    zero_point: ir.Value | None
    range: IntegerRange
    nodes: tuple[ir.Node, ...]


def read_spelled_out(product: ir.Node) -> SpelledOut | None:
    """The quantizer that the Mul `product` ends, None where it ends none of more than 8 bits."""
    scale = _positive_scalar(product)
    if scale is None:
        return None
    nodes = [product]
    subtraction = _before(nodes, "Sub")
    clip = _before(nodes, "Clip")
    addition = _before(nodes, "Add")
    if clip is None or (subtraction is None) != (addition is None):
        return None
    rounding, division = _before(nodes, "Round"), _before(nodes, "Div")
    if rounding is None or division is None or division.inputs[1] is not product.inputs[1]:
        return None
    x, bounds = division.inputs[0], [bound_array(optional_input(clip, index)) for index in (1, 2)]
    if x is None or bounds[0] is None or bounds[1] is None:
        return None
    range_ = IntegerRange(int(bounds[0].reshape(())), int(bounds[1].reshape(())))
    if range_.dtype.itemsize == 1:
        return None
    zero_point = None
    if subtraction is not None and addition is not None:
        cast = _producer(subtraction.inputs[1])
        if cast is None or not is_operator(cast, "Cast") or addition.inputs[1] is not subtraction.inputs[1]:
            return None
        zero_point = cast.inputs[0]
        nodes.append(cast)
    value = np.zeros((), range_.dtype) if zero_point is None else constant_array(zero_point)
    if value is None or value.dtype != range_.dtype or value.size != 1:
        return None
    return SpelledOut(x, Grid(scale, value.reshape(()), None), zero_point, range_, tuple(nodes))


def _positive_scalar(product: ir.Node) -> npt.NDArray[np.float32] | None:
    if not is_operator(product, "Mul"):
        return None
    scale = constant_array(product.inputs[1])
    if scale is None or scale.dtype != np.float32 or scale.size != 1 or not scale.reshape(()) > 0:
        return None
    return scale.reshape(())


def _before(nodes: list[ir.Node], op_type: str) -> ir.Node | None:
    """The node of that type which makes the first input of the last node, and it alone reads; appended."""
    value = nodes[-1].inputs[0]
    node = _producer(value)
    if node is None or value is None or not is_operator(node, op_type) or len(value.uses()) != 1:
        return None
    nodes.append(node)
    return node


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
