"""Ranges that the training graph tracks (`ranges`: "moving_average"), as tf.contrib.quantize did.

The extremes of a tensor in this execution, widened to hold 0, and where symmetric to both sides alike:

    asymmetric   low = min(min x, 0)                        high = max(max x, 0)
    symmetric    low = min(min x, max x * qmin / qmax)      high = max(max x, min x * qmax / qmin)

A weight's range is what it is in this execution. An activation's is their moving average with zero debiasing:

    B = 0.999 B + 0.001 low        n = 0.999 n + 0.001        low' = B / n         B = n = 0 at first

(n is 1 - 0.999^t, the weights summed as B is, so that the first range is that of the first batch exactly.)
The tensor is quantized with the new range, and gradients pass where it does not clip:

    s = (high - low) / (qmax - qmin)        z = clip(round(qmin - low / s), qmin, qmax)

A range that several tensors share (the inputs of a Concat) is updated with the extremes of all of them, and
they are quantized with its value before the update: the first is needed before the last is there. Until it
tracked something the range is the calibrated one.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.initializers import initializer_array, replace_initializer
from rewriter.names import FreeNames
from rewriter.operators import is_constant, is_operator, movement_inputs, traits_of
from rewriter.quantization import MINIMUM_SCALE, IntegerRange
from rewriter.training.emitter import Emitter
from rewriter.training.quantizers import GraphQuantizer
from rewriter.training.state import States

DECAY: Final = 0.999


@dataclasses.dataclass(frozen=True)
class TrackedRange:
    """A range in the checkpoint: two states, shape [] or [channels], and what they are of.

    Attributes:
        low: None where the tensors are never negative: the range begins at 0.
    """

    quantizer: GraphQuantizer
    low: ir.Value | None
    high: ir.Value

    @property
    def states(self) -> tuple[ir.Value, ...]:
        return (self.high,) if self.low is None else (self.low, self.high)


def read_range(graph: ir.Graph, quantizer: GraphQuantizer, emit: Emitter, states: States) -> TrackedRange:
    """Compute scale and zero point of the quantizer from a range in the checkpoint, at `emit`.

    The range starts as the calibrated one. `Tracker.track` keeps it up to date.
    """
    range_ = quantizer.range
    scale, zero_point = initializer_array(quantizer.scale), initializer_array(quantizer.zero_point)
    steps = zero_point.astype(np.float32)
    starts_at_zero = not quantizer.symmetric and all(is_never_negative(one.x) for one in quantizer.nodes)
    low = None
    if not starts_at_zero:
        low = states.add(f"{quantizer.name}_minimum", (range_.qmin - steps) * scale)
    high = states.add(f"{quantizer.name}_maximum", (range_.qmax - steps) * scale)
    tracked = TrackedRange(quantizer, low, high)
    _compute_parameters(graph, tracked, emit)
    for one in quantizer.nodes:
        fake_quantize.set_tracked(one.node)
    return tracked


def _compute_parameters(graph: ir.Graph, tracked: TrackedRange, emit: Emitter) -> None:
    quantizer = tracked.quantizer
    name, zero_point_name = quantizer.scale.name or "", quantizer.zero_point.name or ""
    replace_initializer(graph, quantizer.scale)
    scale = scale_of_range(emit.at(name), tracked.low, tracked.high, quantizer.range, name=name)
    quantizer.scale.replace_all_uses_with(scale)
    zero_point = _constant_zero_point(tracked)
    if zero_point is None:
        assert tracked.low is not None
        replace_initializer(graph, quantizer.zero_point)
        computed = zero_point_of_range(
            emit.at(zero_point_name), tracked.low, scale, quantizer.range, name=zero_point_name
        )
        quantizer.zero_point.replace_all_uses_with(computed)
    else:
        values = np.full(quantizer.zero_point.shape.numpy() if quantizer.zero_point.shape else (), zero_point)
        quantizer.zero_point.const_value = ir.tensor(
            values.astype(quantizer.range.dtype), name=zero_point_name
        )


def _constant_zero_point(tracked: TrackedRange) -> int | None:
    if tracked.quantizer.symmetric:
        return 0
    return tracked.quantizer.range.qmin if tracked.low is None else None


def scale_of_range(
    emit: Emitter, low: ir.Value | None, high: ir.Value, range_: IntegerRange, *, name: str | None = None
) -> ir.Value:
    """(high - low) / (qmax - qmin), at least `MINIMUM_SCALE`; low None is 0."""
    shape = high.shape
    width = high if low is None else emit.op("Sub", high, low, shape=shape)
    steps = emit.constant(float(range_.qmax - range_.qmin))
    scale = emit.op("Div", width, steps, shape=shape)
    return emit.op("Max", scale, emit.constant(MINIMUM_SCALE), shape=shape, name=name)


def zero_point_of_range(
    emit: Emitter, low: ir.Value, scale: ir.Value, range_: IntegerRange, *, name: str | None = None
) -> ir.Value:
    """round(qmin - low / s) in [qmin, qmax], halves away from 0, as float32; qmin >= 0."""
    shape = low.shape
    steps = emit.op("Div", low, scale, shape=shape)
    exact = emit.op("Sub", emit.constant(float(range_.qmin)), steps, shape=shape)
    bounds = [emit.constant(float(bound)) for bound in (range_.qmin, range_.qmax)]
    bounded = emit.op("Clip", exact, *bounds, shape=shape)
    half_up = emit.op("Add", bounded, emit.constant(0.5), shape=shape)
    return emit.op("Floor", half_up, shape=shape, name=name)


def is_never_negative(value: ir.Value) -> bool:
    """Whether the operators say so: a Relu, and what moves or averages its result."""
    node = value.producer()
    if node is None:
        return False
    if is_operator(node, "Relu", "Sigmoid", "Softmax", "HardSigmoid"):
        return True
    if is_operator(node, "Clip") and len(node.inputs) > 1 and is_constant(node.inputs[1]):
        return bool(initializer_array(node.inputs[1]).min() >= 0)
    traits = traits_of(node)
    if is_operator(node, "AveragePool", "GlobalAveragePool", "GlobalMaxPool"):
        return node.inputs[0] is not None and is_never_negative(_float(node.inputs[0]))
    if traits is not None and traits.kind == "movement" and traits.only_moves(node):
        return all(is_never_negative(_float(x)) for x in movement_inputs(node, traits))
    return False


def _float(value: ir.Value) -> ir.Value:
    """Before its quantizer: quantizing keeps the sign."""
    producer = value.producer()
    if producer is not None and fake_quantize.is_fake_quantize(producer):
        return fake_quantize.read(producer).x
    return value


class Tracker:
    """Adds to a training graph what keeps its ranges up to date."""

    def __init__(self, graph: ir.Graph, names: FreeNames, states: States) -> None:
        self._graph = graph
        self._names = names
        self._states = states
        self._weight_sum: ir.Value | None = None

    def track(self, tracked: TrackedRange) -> None:
        """Update the states of the range in every execution."""
        quantizer = tracked.quantizer
        nodes = [fake_quantize.read(one.node) for one in quantizer.nodes if not one.on_grid]
        tensors = list(dict.fromkeys(one.x for one in nodes))
        shared = len(tensors) > 1
        after = self._graph[-1] if shared else tensors[0].producer()
        emit = Emitter(self._graph, self._names, quantizer.name, after)
        low, high = self._extremes(emit, tracked, tensors)
        if not quantizer.weight:
            low = None if low is None else self._average(emit, tracked.low, low)
            high = self._average(emit, tracked.high, high)
        if tracked.low is not None and low is not None:
            self._states.update(tracked.low, low)
        self._states.update(tracked.high, high)
        if not shared:
            scale = scale_of_range(emit, low, high, quantizer.range)
            nodes[0].scale.replace_all_uses_with(scale)
            if nodes[0].zero_point.producer() is not None and low is not None:
                zero_point = zero_point_of_range(emit, low, scale, quantizer.range)
                nodes[0].zero_point.replace_all_uses_with(zero_point)

    def _extremes(
        self, emit: Emitter, tracked: TrackedRange, tensors: list[ir.Value]
    ) -> tuple[ir.Value | None, ir.Value]:
        """Of this execution; the low one None where the range begins at 0."""
        range_, shape = tracked.quantizer.range, tracked.high.shape
        never_negative = all(is_never_negative(x) for x in tensors)
        highest = self._extreme(emit, "Max", tracked, tensors)
        lowest = None if never_negative else self._extreme(emit, "Min", tracked, tensors)
        if not tracked.quantizer.symmetric:
            zero = emit.constant(0.0)
            low = None if lowest is None else emit.op("Min", lowest, zero, shape=shape)
            return low, emit.op("Max", highest, zero, shape=shape)
        opposite = emit.op("Mul", highest, emit.constant(range_.qmin / range_.qmax), shape=shape)
        if lowest is None:
            return opposite, highest
        mirrored = emit.op("Mul", lowest, emit.constant(range_.qmax / range_.qmin), shape=shape)
        return emit.op("Min", lowest, opposite, shape=shape), emit.op("Max", highest, mirrored, shape=shape)

    def _extreme(self, emit: Emitter, which: str, tracked: TrackedRange, tensors: list[ir.Value]) -> ir.Value:
        """Over the elements that share the range; `which`: Min or Max."""
        axis, shape = tracked.quantizer.axis, tracked.high.shape
        parts = []
        for x in tensors:
            axes = []
            if axis is not None:
                assert x.shape is not None
                others = [other for other in range(len(x.shape)) if other != axis % len(x.shape)]
                axes = [emit.constant(others, np.int64)]
            parts.append(emit.op(f"Reduce{which}", x, *axes, shape=shape, keepdims=0))
        return parts[0] if len(parts) == 1 else emit.op(which, *parts, shape=shape)

    def _average(self, emit: Emitter, state: ir.Value | None, observed: ir.Value) -> ir.Value:
        assert state is not None
        shape = observed.shape
        zeros = np.zeros(() if shape is None else shape.numpy())
        total = self._states.add(f"{state.name}.sum", zeros)
        new_total = _decayed(emit, total, emit.op("Mul", observed, emit.constant(1 - DECAY), shape=shape))
        self._states.update(total, new_total)
        return emit.op("Div", new_total, self._sum_of_weights(), shape=shape)

    def _sum_of_weights(self) -> ir.Value:
        """The same for all averages: they begin together."""
        if self._weight_sum is None:
            state = self._states.add("moving_average_weight", np.zeros(()))
            emit = Emitter(self._graph, self._names, state.name or "")
            self._weight_sum = _decayed(emit, state, emit.constant(1 - DECAY))
            self._states.update(state, self._weight_sum)
        return self._weight_sum


def _decayed(emit: Emitter, total: ir.Value, addend: ir.Value) -> ir.Value:
    return emit.op(
        "Add", emit.op("Mul", total, emit.constant(DECAY), shape=total.shape), addend, shape=total.shape
    )
