"""What a gradient rule works with: the node, which gradients are wanted, and a builder of nodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.operators import MICROSOFT
from rewriter.recipe import TrainingDevice

Dimensions = tuple[int | ir.SymbolicDim, ...]


def dims_of(value: ir.Value) -> Dimensions | None:
    """The dimensions, None where the rank is unknown."""
    return None if value.shape is None else tuple(value.shape.dims)


def _is_named(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None


def rank_of(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else value.shape.rank()


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape where every dimension is a number."""
    dims = dims_of(value)
    if dims is None:
        return None
    numbers = tuple(d for d in dims if isinstance(d, int))
    return numbers if len(numbers) == len(dims) else None


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which elements of a tensor are let through, see `Context.masked`.

    bool is a quarter of the bytes, but onnxruntime's CPU kernels for it are slow: on [1024, 1536] with two
    threads FakeQuantGrad takes 0.72 ms, and Mul 0.16.
    """

    value: ir.Value
    of_ones: bool = False
    """float32 ones and zeros in place of truth values."""


class Builder:
    """Appends nodes and constants to a graph under names that are free in it and its subgraphs."""

    def __init__(self, graph: ir.Graph, device: TrainingDevice) -> None:
        self._graph = graph
        self.device = device
        self.names = FreeNames(graph)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        # Products of sizes that only a run knows, by the symbols of the dimensions.
        self.counts: dict[tuple[tuple[str, ...], ir.DataType | None], ir.Value] = {}
        self.zero_with: dict[ir.Value, ir.Value] = {}
        graph.opset_imports.setdefault(MICROSOFT, 1)

    def node(
        self,
        op_type: str,
        inputs: tuple[ir.Value | None, ...],
        attributes: dict[str, Any],
        *,
        domain: str,
        prefix: str,
        outputs: tuple[bool, ...] = (True,),
    ) -> tuple[ir.Value, ...]:
        """The outputs of a new node; an output whose flag is False is left out of the node."""
        while inputs and inputs[-1] is None:  # CUDA's ReduceSum refuses an axes input without a name
            inputs = inputs[:-1]
        name = self.names.take(f"{prefix}/{op_type}")
        values = [
            ir.Value(name=self.names.take(f"{name}_{i}" if i else f"{name}_output") if wanted else "")
            for i, wanted in enumerate(outputs)
        ]
        self._graph.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name))
        return tuple(values)

    def constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer; equal constants are one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.names.take("gradient/constant")
            self._constants[key] = add_initializer(self._graph, name, array)
        return self._constants[key]


class Context:
    """One node whose gradient is asked for.

    Attributes:
        node: the forward node. A rule may give it further outputs (`output`).
        needed: per input, whether its gradient is wanted.
    """

    def __init__(
        self, builder: Builder, node: ir.Node, needed: tuple[bool, ...], data: Collection[ir.Value]
    ) -> None:
        self._builder = builder
        self._data = data
        self._prefix = f"gradient/{node.name}"
        self.node = node
        self.needed = needed

    @property
    def for_cpu_only(self) -> bool:
        """Whether forms that leave a GPU idle may be emitted."""
        return self._builder.device == "cpu"

    def needs(self, index: int) -> bool:
        return index < len(self.needed) and self.needed[index]

    def input(self, index: int) -> ir.Value:
        """An input that the operator requires."""
        value = self.node.inputs[index]
        assert value is not None
        return value

    def optional(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def output(self, index: int = 0, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """An output; one that was left out is added to the node, with the given data type."""
        if len(self.node.outputs) <= index:
            self.node.resize_outputs(index + 1)
        value = self.node.outputs[index]
        if not value.name:
            value.name = self._builder.names.take(f"{self._prefix}/forward_output_{index}")
            value.type = ir.TensorType(dtype)
        return value

    def depends_on_data(self, value: ir.Value) -> bool:
        """Whether the value changes with the batch, and is not computed from parameters alone."""
        return value in self._data

    def set_zero_with(self, gradient: ir.Value, value: ir.Value) -> None:
        """Note that `gradient` is zero wherever `value` is: a rule that masks by that need not."""
        self._builder.zero_with[gradient] = value

    def is_zero_with(self, gradient: ir.Value, value: ir.Value) -> bool:
        return self._builder.zero_with.get(gradient) is value

    # Emitting

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The output of a new single-output node."""
        return self.ops(op_type, *inputs, domain=domain, outputs=(True,), **attributes)[0]

    def ms(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node of onnxruntime's own operator set."""
        return self.op(op_type, *inputs, domain=MICROSOFT, **attributes)

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: tuple[bool, ...],
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """All outputs of a new node; those whose flag is False are left out of it."""
        return self._builder.node(
            op_type, inputs, attributes, domain=domain, prefix=self._prefix, outputs=outputs
        )

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 vector: axes, a shape, sizes."""
        return self._builder.constant(np.array(numbers, np.int64))

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """A constant of shape [] and the data type of `like`."""
        return self._builder.constant(np.array(number, (like.dtype or ir.DataType.FLOAT).numpy()))

    def array(self, array: npt.NDArray[np.generic]) -> ir.Value:
        return self._builder.constant(array)

    # Shapes

    def shape(self, value: ir.Value, start: int = 0, end: int | None = None) -> ir.Value:
        """int64 vector of the dimensions [start:end] of `value`, a constant where they are known."""
        dims = dims_of(value)
        if dims is not None:
            numbers = [d for d in dims[start:end] if isinstance(d, int)]
            if len(numbers) == len(dims[start:end]):
                return self.ints(*numbers)
        limits: dict[str, Any] = {"start": start} if end is None else {"start": start, "end": end}
        return self.op("Shape", value, **limits)

    def dimension(self, value: ir.Value, axis: int) -> ir.Value:
        """int64 vector of one element: the size of `axis`, which may be negative."""
        return self.shape(value, axis, axis + 1 if axis != -1 else None)

    def elements(self, value: ir.Value, axes: Iterable[int], like: ir.Value) -> ir.Value:
        """How many elements `value` (of known rank) has along `axes`: a scalar of `like`'s data type."""
        dims = dims_of(value)
        assert dims is not None
        chosen = [axis % len(dims) for axis in axes]
        known = math.prod(dim for axis in chosen if isinstance(dim := dims[axis], int))
        unknown = [axis for axis in chosen if not isinstance(dims[axis], int)]
        if not unknown:
            return self.scalar(known, like)
        symbols = tuple(
            str(dims[axis]) if _is_named(dims[axis]) else f"{value.name}:{axis}" for axis in unknown
        )
        counts = self._builder.counts
        if (symbols, like.dtype) not in counts:
            sizes = [self.dimension(value, axis) for axis in unknown]
            shape = sizes[0] if len(sizes) == 1 else self.op("Concat", *sizes, axis=0)
            counts[symbols, like.dtype] = self.product(shape, like)
        return self.times(counts[symbols, like.dtype], known)

    def product(self, sizes: ir.Value, like: ir.Value) -> ir.Value:
        """The product of an int64 vector of sizes, as a scalar of `like`'s data type: a sum of ones.

        Cast(Size) would be computed on the CPU, where CUDA's Shape and Size write, and copied to the GPU in
        every step; the shape of the ones is read on the CPU.
        """
        one = np.ones(1, (like.dtype or ir.DataType.FLOAT).numpy())
        return self.op("ReduceSum", self.op("ConstantOfShape", sizes, value=ir.tensor(one)), keepdims=0)

    def reshape_like(self, gradient: ir.Value, value: ir.Value) -> ir.Value:
        return self.op("Reshape", gradient, self.shape(value), **_ZERO_IS_ZERO)

    def expand_like(self, gradient: ir.Value, value: ir.Value) -> ir.Value:
        return self.op("Expand", gradient, self.shape(value))

    def zeros_like(self, value: ir.Value) -> ir.Value:
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        return self.op("ConstantOfShape", self.shape(value), value=ir.tensor(np.zeros(1, dtype)))

    # Arithmetic

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Add", a, b)

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Sub", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Mul", a, b)

    def div(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Div", a, b)

    def neg(self, a: ir.Value) -> ir.Value:
        return self.op("Neg", a)

    def times(self, a: ir.Value, factor: float) -> ir.Value:
        """a * factor; `a` itself where the factor is one."""
        return a if factor == 1.0 else self.mul(a, self.scalar(factor, a))

    def as_float(self, mask: ir.Value, like: ir.Value) -> ir.Value:
        """0 and 1 in the data type of `like`."""
        return self.op("Cast", mask, to=(like.dtype or ir.DataType.FLOAT).value)

    def where_positive(self, x: ir.Value) -> Mask:
        """Where x (float32) > 0; of ones, a subnormal x lets a part through."""
        if self.for_cpu_only:
            return Mask(self.op("HardSigmoid", x, alpha=_STEEPEST, beta=0.0), of_ones=True)
        return Mask(self.op("Greater", x, self.scalar(0, x)))

    def where_equal(self, a: ir.Value, b: ir.Value) -> Mask:
        """Where a = b (float32, of one shape)."""
        if self.for_cpu_only:
            distance = self.op("Abs", self.sub(a, b))
            return Mask(self.op("HardSigmoid", distance, alpha=-_STEEPEST, beta=1.0), of_ones=True)
        return Mask(self.op("Equal", a, b))

    def masked(self, gradient: ir.Value, mask: Mask) -> ir.Value:
        """`gradient` (finite float32) where `mask` (of the same shape) holds, else 0.

        Of truth values FakeQuantGrad makes that in one pass: on [32, 64, 56, 56] with two threads 5 ms with
        the mask, against 7 for Cast and Mul, 30 for Where and 31 for com.microsoft.ReluGrad.
        """
        return (
            self.mul(gradient, mask.value) if mask.of_ones else self.ms("FakeQuantGrad", gradient, mask.value)
        )

    def sum_to(self, gradient: ir.Value, operand: ir.Value, dims: Dimensions | None) -> ir.Value:
        """The gradient of `operand` that was broadcast to the dimensions `dims`, which `gradient` has.

        Which axes to sum is decided here where the shapes prove it and at run time elsewhere.
        """
        target = static_shape(operand)
        if target is not None and all(d == 1 for d in target) and dims != target:
            total = self.op("ReduceSum", gradient, keepdims=0)
            return self.op("Reshape", total, self.ints(*target)) if target else total
        axes = broadcast_axes(dims_of(operand), dims)
        if axes is None or dims is None:
            return self._sum_to_at_run_time(gradient, operand, None if dims is None else len(dims))
        if not axes:
            return gradient
        added = len(dims) - (rank_of(operand) or 0)
        only_added = axes == tuple(range(added))
        total = self.op("ReduceSum", gradient, self.ints(*axes), keepdims=int(not only_added))
        return total if only_added or not added else self.op("Squeeze", total, self.ints(*range(added)))

    def _sum_to_at_run_time(self, gradient: ir.Value, operand: ir.Value, rank: int | None) -> ir.Value:
        """Sums the axes that are 1 in the operand. All but the sum is arithmetic on shapes, which onnxruntime
        does on the CPU, where shapes are and where the sum reads its axes, also when the sum is on a GPU."""
        shape = self.op("Shape", operand)
        aligned = self._aligned(shape, rank_of(operand), gradient, rank)
        axes = self._positions(self.op("Equal", aligned, self.ints(1)))
        total = self.op("ReduceSum", gradient, axes, keepdims=1, noop_with_empty_axes=1)
        return self.op("Reshape", total, shape, **_ZERO_IS_ZERO)

    def _aligned(
        self, shape: ir.Value, own_rank: int | None, gradient: ir.Value, rank: int | None
    ) -> ir.Value:
        """The shape with as many ones before it as the gradient, of rank `rank`, has more dimensions."""
        if rank is not None and own_rank is not None:
            ones = self.ints(*[1] * (rank - own_rank))
            return self.op("Concat", ones, shape, axis=0) if rank > own_rank else shape
        dims = self.op("Shape", gradient)
        true = self.op("Equal", dims, dims)
        ones = self.op("Cast", true, to=ir.DataType.INT64.value)
        last = self.add(self._positions(true), self.op("Size", shape))
        return self.op("Gather", self.op("Concat", ones, shape, axis=0), last)

    def _positions(self, mask: ir.Value) -> ir.Value:
        """int64 vector of the positions at which a vector of truth values holds."""
        return self.op("Reshape", self.op("NonZero", mask), self.ints(-1))


# Times any normal number that is more than 1, and no overflow for those below 1.
_STEEPEST: Final = 3e38

# Reshape to a shape that was read off a tensor: a 0 in it is a size, not "copy this dimension".
_ZERO_IS_ZERO: dict[str, Any] = {"allowzero": 1}


def broadcast_axes(dims: Dimensions | None, result_dims: Dimensions | None) -> tuple[int, ...] | None:
    """The axes of the result along which an operand was broadcast; None where the shapes do not tell."""
    if dims is None or result_dims is None or len(dims) > len(result_dims):
        return None
    added = len(result_dims) - len(dims)
    axes = list(range(added))
    for axis, (dim, result_dim) in enumerate(zip(dims, result_dims[added:], strict=True), added):
        if dim == 1:
            if result_dim != 1:
                axes.append(axis)
        elif not isinstance(dim, int) and result_dim != 1 and (dim.value is None or dim != result_dim):
            return None
    return tuple(axes)
