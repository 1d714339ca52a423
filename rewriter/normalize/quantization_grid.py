"""Reads the grid of a QuantizeLinear or DequantizeLinear, and the saturation that belongs to a pair."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.normalize.constant_bounds import bound_array
from rewriter.operators import is_operator
from rewriter.quantization import IntegerRange

_Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scale and zero point of one Q or DQ, and the axis of a per-channel one."""

    scale: _Array
    zero_point: _Array
    axis: int | None

    def equals(self, other: Grid) -> bool:
        return (
            self.axis == other.axis
            and self.zero_point.dtype == other.zero_point.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """The input, None where the node does not have it."""
    return node.inputs[index] if index < len(node.inputs) else None


def read_grid(node: ir.Node) -> Grid | None:
    """The grid of a Q or DQ; None where it is computed, not float32, not positive, or of other integers."""
    scale, zero_point = constant_array(optional_input(node, 1)), constant_array(optional_input(node, 2))
    if scale is None or node.attributes.get_int("block_size", 0) != 0:
        return None
    if scale.dtype != np.float32 or not (np.isfinite(scale) & (scale > 0)).all():
        return None
    if optional_input(node, 2) is None:
        zero_point = np.zeros(scale.shape, _default_type(node))
    if zero_point is None or zero_point.dtype not in (np.int8, np.uint8, np.int32):
        return None
    axis = _axis_of(node, scale)
    if zero_point.shape != scale.shape and zero_point.size == scale.size == 1:
        zero_point = zero_point.reshape(scale.shape)
    if axis is not None and zero_point.shape == scale.shape:
        return Grid(scale, zero_point, axis)
    if scale.size == zero_point.size == 1:
        return Grid(scale.reshape(()), zero_point.reshape(()), None)
    return None


def _axis_of(node: ir.Node, scale: _Array) -> int | None:
    """The quantization axis of a 1-D scale, None where there is one scale for the whole tensor.

    One scale in a vector is that of the one channel only if the node names the axis and it has one channel:
    the axis of a node that names none is 1, whatever is quantized.
    """
    x = node.inputs[0]
    if x is None or x.shape is None or scale.ndim != 1:
        return None
    axis = node.attributes.get_int("axis", 1)
    if not -len(x.shape) <= axis < len(x.shape):
        return None
    if scale.size == 1 and ("axis" not in node.attributes or x.shape[axis] != 1):
        return None
    return axis % len(x.shape)


def _default_type(node: ir.Node) -> np.dtype[Any]:
    x = node.inputs[0]
    if is_operator(node, "DequantizeLinear") and x is not None and x.dtype is not None:
        return x.dtype.numpy()
    return np.dtype(np.uint8)


def integer_bounds(clip: ir.Node) -> IntegerRange | None:
    """The constant bounds of a Clip of integers."""
    bounds = [bound_array(value) for value in clip.inputs[1:3]]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return IntegerRange(int(bounds[0].reshape(())), int(bounds[1].reshape(())))


def float_saturation(x: ir.Value, grid: Grid) -> tuple[ir.Value, IntegerRange | None]:
    """What is quantized, before the saturation that belongs to the pair, and its integer range.

    `x` itself and None where no Clip, or Max and Min, before it has bounds that lie on the grid.
    """
    node = x.producer()
    if node is None or len(x.uses()) != 1 or x.is_graph_output():
        return x, None
    low: ir.Value | None
    high: ir.Value | None
    if is_operator(node, "Clip"):
        source, low, high = node.inputs[0], optional_input(node, 1), optional_input(node, 2)
    elif is_operator(node, "Min") and len(node.inputs) == 2 and node.inputs[0] is not None:
        inner, high = node.inputs[0].producer(), node.inputs[1]
        if inner is None or not is_operator(inner, "Max") or len(inner.inputs) != 2:
            return x, None
        if len(inner.outputs[0].uses()) != 1 or inner.outputs[0].is_graph_output():
            return x, None
        source, low = inner.inputs
    else:
        return x, None
    qmin, qmax = _on_grid(low, grid), _on_grid(high, grid)
    if source is None or qmin is None or qmax is None or qmin >= qmax:
        return x, None
    return source, IntegerRange(qmin, qmax)


def _on_grid(bound: ir.Value | None, grid: Grid) -> int | None:
    """The integer that a float bound is, the same for all channels."""
    array = bound_array(bound)
    if array is None or array.size != grid.scale.size:
        return None
    steps = array.reshape(grid.scale.shape).astype(np.float64) / grid.scale + grid.zero_point
    rounded = np.rint(steps)
    info = np.iinfo(grid.zero_point.dtype)
    if np.abs(steps - rounded).max() > 1e-4 or rounded.min() != rounded.max():
        return None
    return int(rounded.min()) if info.min <= rounded.min() <= info.max else None
