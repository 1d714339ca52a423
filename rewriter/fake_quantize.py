"""The nodes that stand for quantizers in the graph between insertion and lowering.

    y, steps? = FakeQuantize(x, scale, zero_point, gate?) {qmin, qmax, axis?, on_grid, tracked?}
    y = FakeQuantizeBias(bias, x_scale, weight_scale, gate?)     = round(bias / (s_x * s_w)) * (s_x * s_w)
    y = StraightThroughRound(x)                                  = round_half_even(x)
    s = LearnedScale(initial, p)                                 = initial * exp(p)

The zero point is an initializer of the integer type, or computed in the graph: then it is float32, of
integral values in [qmin, qmax]. Where a gate (bool, shape []) is given and false, y = x. steps is x / scale,
for gradients of per-channel quantizers. StraightThroughRound has the gradient of the identity: it makes the
zero points that training moves. LearnedScale makes the scales (`training.learned_ranges`): as one node it has
a gradient of one product.

One node per quantized tensor keeps the passes in between simple: the gradient of a quantizer is one rule,
and each product lowers it in the form that serves it best (`rewriter.lowering`). The nodes never reach a
file.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import onnx_ir as ir

from rewriter.quantization import IntegerRange

DOMAIN: Final = "qat"
OP_TYPE: Final = "FakeQuantize"
BIAS_OP_TYPE: Final = "FakeQuantizeBias"
ROUND_OP_TYPE: Final = "StraightThroughRound"
SCALE_OP_TYPE: Final = "LearnedScale"

_GATE: Final = 3  # input of both quantizer nodes


@dataclasses.dataclass(frozen=True)
class FakeQuantize:
    """A FakeQuantize node, read.

    Attributes:
        tracked: the range follows the tensor, as in tf.contrib.quantize: it has no gradient, and that of x
            is clipped at the ends of what the integers represent. Otherwise it passes up to what rounds into
            the range (LSQ).
    """

    node: ir.Node
    x: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    gate: ir.Value | None
    range: IntegerRange
    axis: int | None
    on_grid: bool
    tracked: bool

    @property
    def margin(self) -> float:
        """How far outside of what the integers represent gradients still pass, in steps.

        Of a tracked range it is the rounding of its ends in float32: the largest element of a tensor lies on
        the end of its own range.
        """
        return (self.range.qmax - self.range.qmin) * 2.0**-20 if self.tracked else 0.5

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def steps(self) -> ir.Value | None:
        return self.node.outputs[1] if len(self.node.outputs) > 1 else None


def is_fake_quantize(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == OP_TYPE


def make(
    x: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value,
    range_: IntegerRange,
    *,
    axis: int | None,
    on_grid: bool = False,
    name: str | None = None,
) -> ir.Node:
    """A FakeQuantize node on `x`, not yet in a graph; its output has the shape and type of `x`.

    `scale` (float32) and `zero_point` (`range_.dtype`) have shape [] or, with `axis`, [x.shape[axis]].
    """
    attributes = {"qmin": range_.qmin, "qmax": range_.qmax, "on_grid": int(on_grid)}
    if axis is not None:
        attributes["axis"] = axis
    output = ir.Value(name=f"{x.name}_fake_quantized", shape=x.shape, type=x.type)
    return ir.node(OP_TYPE, [x, scale, zero_point], attributes, domain=DOMAIN, outputs=[output], name=name)


def read(node: ir.Node) -> FakeQuantize:
    """The parts of a FakeQuantize node (`is_fake_quantize(node)` holds)."""
    x, scale, zero_point = node.inputs[:_GATE]
    assert x is not None
    assert scale is not None
    assert zero_point is not None
    axis = node.attributes.get("axis")
    return FakeQuantize(
        node=node,
        x=x,
        scale=scale,
        zero_point=zero_point,
        gate=_gate(node),
        range=IntegerRange(node.attributes["qmin"].as_int(), node.attributes["qmax"].as_int()),
        axis=None if axis is None else axis.as_int(),
        on_grid=bool(node.attributes["on_grid"].as_int()),
        tracked=bool(node.attributes.get_int("tracked", 0)),
    )


def set_gate(node: ir.Node, gate: ir.Value) -> None:
    """Make a FakeQuantize or FakeQuantizeBias node act only where `gate` (bool, shape []) is true."""
    if len(node.inputs) <= _GATE:
        node.resize_inputs(_GATE + 1)
    node.replace_input_with(_GATE, gate)


def set_tracked(node: ir.Node) -> None:
    """Say that the range of a FakeQuantize node is tracked; see `FakeQuantize.tracked`."""
    node.attributes["tracked"] = ir.AttrInt64("tracked", 1)


def _gate(node: ir.Node) -> ir.Value | None:
    return node.inputs[_GATE] if len(node.inputs) > _GATE else None


@dataclasses.dataclass(frozen=True)
class FakeQuantizeBias:
    """A FakeQuantizeBias node, read: float32 values, one per output channel of a layer.

    Attributes:
        x_scale: scale of the layer's input, shape [].
        weight_scale: scale of the layer's weight, shape [] or [channels].
    """

    node: ir.Node
    bias: ir.Value
    x_scale: ir.Value
    weight_scale: ir.Value
    gate: ir.Value | None


def is_fake_quantize_bias(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == BIAS_OP_TYPE


def is_straight_through_round(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == ROUND_OP_TYPE


def make_round(x: ir.Value, *, name: str) -> ir.Node:
    """A StraightThroughRound node on `x`, not yet in a graph."""
    output = ir.Value(name=f"{name}_output", shape=x.shape, type=x.type)
    return ir.node(ROUND_OP_TYPE, [x], domain=DOMAIN, outputs=[output], name=name)


def is_learned_scale(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == SCALE_OP_TYPE


def make_learned_scale(initial: ir.Value, parameter: ir.Value, *, name: str, node_name: str) -> ir.Node:
    """A LearnedScale node whose output has this name and the shape of `parameter`, not yet in a graph."""
    output = ir.Value(name=name, shape=parameter.shape, type=parameter.type)
    return ir.node(SCALE_OP_TYPE, [initial, parameter], domain=DOMAIN, outputs=[output], name=node_name)


def make_bias(bias: ir.Value, x_scale: ir.Value, weight_scale: ir.Value, *, name: str) -> ir.Node:
    """A FakeQuantizeBias node on `bias`, not yet in a graph; its output has the shape and type of `bias`."""
    output = ir.Value(name=f"{name}_output", shape=bias.shape, type=bias.type)
    inputs = [bias, x_scale, weight_scale]
    return ir.node(BIAS_OP_TYPE, inputs, domain=DOMAIN, outputs=[output], name=name)


def read_bias(node: ir.Node) -> FakeQuantizeBias:
    """The parts of a FakeQuantizeBias node (`is_fake_quantize_bias(node)` holds)."""
    bias, x_scale, weight_scale = node.inputs[:_GATE]
    assert bias is not None
    assert x_scale is not None
    assert weight_scale is not None
    return FakeQuantizeBias(node, bias, x_scale, weight_scale, _gate(node))
