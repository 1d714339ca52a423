"""How scales and zero points are trained: s = s0 * exp(p), z = clip(round(z0 + (qmax - qmin) * o), qmin,
qmax).

p and o are trainable and 0 at first. s cannot reach 0, a step of Adam changes every scale by the same few
parts in a thousand, dL/dp = s * dL/ds does not depend on the unit of the tensor, and weight decay pulls
towards the calibrated scale. o counts in widths of the range, so that the same step moves both ends of a
range alike at any number of bits; the rounding is straight through (LSQ+, Bhalgat et al. 2020, whose offset
is -s z).

The zero point is trained of asymmetric per-tensor quantizers whose calibrated range has two sides. Where it
begins or ends at 0, as after a Relu, an offset could only waste integers. (`benchmarks.fashion_mnist
--parameterizations` compares what else s could be.)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.initializers import add_initializer, initializer_array, replace_initializer
from rewriter.names import FreeNames
from rewriter.training.emitter import Emitter
from rewriter.training.quantizers import GraphQuantizer


@dataclasses.dataclass(frozen=True)
class LearnedRange:
    """The values around one trained range in a graph.

    Attributes:
        scale: what the quantizers read; named like the initializer it replaces.
        parameter: initializer p, zeros, `{scale}.log_multiplier` where that is free; shape of the scale.
        offset: initializer o, 0, `{zero point}.offset` likewise; shape []; None: the zero point stays.
        constants: initializers with the calibrated scale and zero point.
    """

    quantizer: GraphQuantizer
    scale: ir.Value
    parameter: ir.Value
    offset: ir.Value | None
    constants: tuple[ir.Value, ...]

    @property
    def parameters(self) -> tuple[ir.Value, ...]:
        return (self.parameter,) if self.offset is None else (self.parameter, self.offset)


def learn_range(
    graph: ir.Graph, quantizer: GraphQuantizer, emit: Emitter, names: FreeNames, *, fixed_zero_point: bool
) -> LearnedRange:
    """Compute scale and zero point of the quantizer from parameters, at `emit`.

    Args:
        fixed_zero_point: whether the zero point stays, whatever the quantizer.
    """
    scale, initial, parameter = _learn_scale(graph, quantizer.scale, emit, names)
    offset, constants = None, [initial]
    if not fixed_zero_point and has_learned_zero_point(quantizer):
        offset, constant = _learn_zero_point(graph, quantizer, emit, names)
        constants.append(constant)
    return LearnedRange(quantizer, scale, parameter, offset, tuple(constants))


def has_learned_zero_point(quantizer: GraphQuantizer) -> bool:
    zero_point = int(initializer_array(quantizer.zero_point).reshape(-1)[0])
    return (
        not quantizer.symmetric
        and quantizer.axis is None
        and quantizer.range.qmin < zero_point < quantizer.range.qmax
    )


def _learn_scale(
    graph: ir.Graph, scale: ir.Value, emit: Emitter, names: FreeNames
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The trained scale, the initial one and the parameter."""
    name = scale.name or ""
    values = initializer_array(scale)
    replace_initializer(graph, scale)
    initial = add_initializer(graph, names.take(f"{name}.initial"), values)
    parameter = add_initializer(graph, names.take(f"{name}.log_multiplier"), np.zeros_like(values))
    node = fake_quantize.make_learned_scale(
        initial, parameter, name=name, node_name=names.take(f"{name}/LearnedScale")
    )
    emit.at(name).insert(node)
    trained = node.outputs[0]
    scale.replace_all_uses_with(trained)
    return trained, initial, parameter


def _learn_zero_point(
    graph: ir.Graph, quantizer: GraphQuantizer, emit: Emitter, names: FreeNames
) -> tuple[ir.Value, ir.Value]:
    """The parameter and the constant z0."""
    zero_point, range_ = quantizer.zero_point, quantizer.range
    name = zero_point.name or ""
    start = float(initializer_array(zero_point).reshape(()))
    replace_initializer(graph, zero_point)
    emit = emit.at(name)
    offset = add_initializer(graph, names.take(f"{name}.offset"), np.zeros((), np.float32))
    constant = emit.constant(start)
    width = emit.constant(float(range_.qmax - range_.qmin))
    moved = emit.op("Add", constant, emit.op("Mul", offset, width, shape=[]), shape=[])
    node = fake_quantize.make_round(moved, name=names.take(f"{name}/Round"))
    emit.insert(node)
    bounds = [emit.constant(float(bound)) for bound in (range_.qmin, range_.qmax)]
    trained = emit.op("Clip", node.outputs[0], *bounds, shape=[], name=name)
    zero_point.replace_all_uses_with(trained)
    return offset, constant
