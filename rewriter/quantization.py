"""Quantizers as plain data, and their arithmetic in NumPy.

    q = clip(round_half_even(x / s) + z, qmin, qmax)        y = (q - z) * s

Placement decides which tensor gets which quantizer and returns a `Plan`; calibration gives each quantizer
its `QuantizerParameters`; insertion carries the plan out. The manifest and the report show the same plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from rewriter.recipe import RangeSource

FloatArray = npt.NDArray[np.floating]
IntegerArray = npt.NDArray[np.integer]

_Number = TypeVar("_Number", bound=np.number)

QuantizerKind = Literal["weight", "activation"]


@dataclasses.dataclass(frozen=True)
class IntegerRange:
    """The integers [qmin, qmax] that a quantizer maps to, and the integer type that stores them."""

    qmin: int
    qmax: int

    @classmethod
    def for_weights(cls, bits: int, *, symmetric: bool = True) -> IntegerRange:
        """Narrow. Symmetric: signed, around 0, so that the zero point is 0 and -qmin == qmax; asymmetric:
        unsigned from 1, as tf.contrib.quantize has it."""
        if symmetric:
            return cls(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
        return cls(1, 2**bits - 1)

    @classmethod
    def for_activations(cls, bits: int, *, symmetric: bool) -> IntegerRange:
        """Symmetric: signed with zero point 0; asymmetric: unsigned with any zero point in range."""
        if symmetric:
            return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return cls(0, 2**bits - 1)

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The smallest integer type that holds the range; QuantizeLinear of opset 13..18 has the 8-bit ones
        only."""
        wide = self.qmax - self.qmin > 255
        if self.qmin >= 0:
            return np.dtype(np.uint16 if wide else np.uint8)
        return np.dtype(np.int16 if wide else np.int8)


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """One tensor that a quantizer is inserted on.

    Attributes:
        name: name of the tensor (the graph value before quantization).
        consumers: names of the nodes that read the quantized tensor instead of the float one.
        on_grid: the values are already quantized by the same scale (the output of an operator that only
            moves data), so that quantizing again changes nothing; the pair is there for runtimes that
            match Q/DQ patterns, and training leaves it out.
        graph_output: the tensor is an output of the graph, which becomes the quantized tensor.
    """

    name: str
    consumers: tuple[str, ...]
    on_grid: bool = False
    graph_output: bool = False


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One scale and zero point, and the tensors that share them.

    Attributes:
        name: unique; the scale initializer is called `{name}_scale`, the zero point `{name}_zero_point`.
        axis: quantization axis of a per-channel quantizer, None for per-tensor.
        tensors: at least one; the first names the quantizer. Tensors that share a range (the inputs and
            the output of a Concat, both sides of a Reshape) share a quantizer.
        ranges: where the range comes from during training.
        quant_delay: the first training step at which the quantizer acts; 0 and 1: always.
        existing: the model came with this quantizer; its scale is kept as found.
    """

    name: str
    kind: QuantizerKind
    bits: int
    range: IntegerRange
    symmetric: bool
    axis: int | None
    tensors: tuple[QuantizedTensor, ...]
    ranges: RangeSource = "learned"
    quant_delay: int = 0
    existing: bool = False

    @property
    def scale_name(self) -> str:
        return f"{self.name}_scale"

    @property
    def zero_point_name(self) -> str:
        return f"{self.name}_zero_point"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A node that could have been quantized and is not, or not fully, with the reason for a person."""

    node: str
    op: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What placement decided; plain data, in graph order."""

    quantizers: tuple[Quantizer, ...]
    skipped: tuple[Skipped, ...]
    quantized_nodes: tuple[str, ...]


NO_PLAN = Plan(quantizers=(), skipped=(), quantized_nodes=())


@dataclasses.dataclass(frozen=True)
class QuantizerParameters:
    """Start values of a quantizer.

    Attributes:
        scale: float32, > 0, shape [] (per-tensor) or [channels].
        zero_point: `Quantizer.range.dtype`, same shape as the scale.
        initialized: how, for the manifest: "values", "calibration:mse", "batch_norm", "existing",
            "uncalibrated", ...
        warning: a sentence for the manifest.
    """

    scale: FloatArray
    zero_point: IntegerArray
    initialized: str
    warning: str | None = None


ParametersByQuantizer = Mapping[str, QuantizerParameters]

# Mean and standard deviation per channel of tensors that batch norm normalized, by tensor name.
Statistics = Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


def quantize(
    x: FloatArray, scale: FloatArray, zero_point: IntegerArray, range_: IntegerRange, axis: int | None = None
) -> IntegerArray:
    """q = clip(round_half_even(x / s) + z, qmin, qmax), in the precision of `x`; same shape as `x`."""
    s, z = _along(scale, x.ndim, axis), _along(zero_point, x.ndim, axis).astype(np.int64)
    q: FloatArray = np.clip(np.rint(x / s) + z, range_.qmin, range_.qmax)
    return q.astype(range_.dtype)


def dequantize(
    q: IntegerArray, scale: FloatArray, zero_point: IntegerArray, axis: int | None = None
) -> FloatArray:
    """y = (q - z) * s, in the precision of `scale`; same shape as `q`."""
    s, z = _along(scale, q.ndim, axis), _along(zero_point, q.ndim, axis).astype(np.int64)
    y: FloatArray = (q.astype(np.int64) - z) * s
    return y.astype(scale.dtype)


def parameters_from_range(
    low: FloatArray | float, high: FloatArray | float, range_: IntegerRange, *, symmetric: bool
) -> tuple[npt.NDArray[np.float32], IntegerArray]:
    """Scale and zero point whose grid covers [low, high] and holds 0 exactly.

    The range is first extended to contain 0. Symmetric: zero point 0 and the scale that covers the larger
    side; asymmetric: scale = (high - low) / (qmax - qmin), zero point = round(qmin - low / scale).
    The scale is at least `MINIMUM_SCALE`: a range of zero width gets that.
    """
    lo = np.minimum(np.asarray(low, np.float64), 0.0)
    hi = np.maximum(np.asarray(high, np.float64), 0.0)
    if symmetric:
        scale = np.maximum(hi / range_.qmax, lo / range_.qmin)
        zero_point = np.zeros_like(scale)
    else:
        scale = (hi - lo) / (range_.qmax - range_.qmin)
        safe = np.maximum(scale, MINIMUM_SCALE)
        zero_point = np.clip(np.rint(range_.qmin - lo / safe), range_.qmin, range_.qmax)
    scale = np.maximum(scale, MINIMUM_SCALE)
    return scale.astype(np.float32), zero_point.astype(range_.dtype)


# Keeps 1/s and s finite in float32, and int32 biases at s_x * s_w representable for all-zero channels.
MINIMUM_SCALE = 1e-8


def _along(parameter: npt.NDArray[_Number], rank: int, axis: int | None) -> npt.NDArray[_Number]:
    """The per-channel parameter reshaped to broadcast along `axis` of a tensor of `rank` dimensions."""
    if axis is None or parameter.ndim == 0:
        return parameter.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return parameter.reshape(shape)
