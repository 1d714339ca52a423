"""Refuses small models that ask for tensors of any size, before native code makes them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import constant_array

_Shape = list[int]


@dataclasses.dataclass(frozen=True)
class TensorLimits:
    """Bounds on a tensor whose size constants of the graph say.

    Attributes:
        elements: 2^28 are 1 GiB of float32.
        vector: elements of a tensor with one dimension. ONNX's shape inference follows the values of
            vectors one by one (two million a second), because they may be shapes.
    """

    elements: int = 2**28
    vector: int = 2**22


class BoundTensorsPass(ir.passes.InPlacePass):
    """Checks the nodes that make tensors of a size that their constant inputs say; changes nothing.

    Raises QatError, model_too_large.
    """

    def __init__(self, limits: TensorLimits = TensorLimits()) -> None:
        super().__init__()
        self._limits = limits

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph.all_nodes():
            rule = _SHAPES.get(node.op_type) if node.domain == "" else None
            shape = None if rule is None else rule([_small_array(value) for value in node.inputs], node)
            if shape is not None:
                self._require_small(node, shape)
        return ir.passes.PassResult(model, False)

    def _require_small(self, node: ir.Node, shape: _Shape) -> None:
        elements = math.prod(shape)
        limit = self._limits.vector if len(shape) == 1 else self._limits.elements
        if elements > limit:
            raise QatError(
                ErrorCode.MODEL_TOO_LARGE,
                f"{node.op_type} makes a tensor of {elements} elements, more than the {limit} allowed; "
                "if it is a constant, store it as an initializer.",
                node=node.name,
            )


_Array = npt.NDArray[Any]


def _small_array(value: ir.Value | None) -> _Array | None:
    """A scalar or a shape; larger constants are not read."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return constant_array(value) if tensor is not None and tensor.size <= _LARGEST_RANK else None


_LARGEST_RANK: Final = 64


def _range(inputs: list[_Array | None], node: ir.Node) -> _Shape | None:
    start, limit, delta = (None if a is None or a.size != 1 else a.item() for a in inputs)
    if start is None or limit is None or not delta:
        return None
    steps = (limit - start) / delta
    return [max(math.ceil(steps), 0)] if math.isfinite(steps) else None


def _constant_of_shape(inputs: list[_Array | None], node: ir.Node) -> _Shape | None:
    return None if inputs[0] is None else _sizes(inputs[0])


def _expand(inputs: list[_Array | None], node: ir.Node) -> _Shape | None:
    # At least as large: where the shape has a 1, the size of the input counts.
    return None if inputs[1] is None else _sizes(inputs[1])


def _tile(inputs: list[_Array | None], node: ir.Node) -> _Shape | None:
    x, repeats = node.inputs[0], inputs[1]
    if x is None or x.shape is None or repeats is None or len(x.shape) != repeats.size:
        return None
    known = [size if isinstance(size, int) else 1 for size in x.shape]
    return [size * count for size, count in zip(known, _sizes(repeats), strict=True)]


def _sizes(array: _Array) -> _Shape:
    """A negative size is no size."""
    return [1 if size < 0 else int(size) for size in array.reshape(-1)]


def has_long_vector(model: ir.Model, limits: TensorLimits = TensorLimits()) -> bool:
    """Whether a value of one dimension is known to be longer than the limit."""
    values = itertools.chain(model.graph.inputs, *(node.outputs for node in model.graph.all_nodes()))
    return any(
        value.shape is not None
        and len(value.shape) == 1
        and isinstance(size := value.shape[0], int)
        and size > limits.vector
        for value in values
    )


_SHAPES: Final[Mapping[str, Callable[[list[_Array | None], ir.Node], _Shape | None]]] = {
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Range": _range,
    "Tile": _tile,
}
