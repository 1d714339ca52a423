"""The FakeQuantize node: how a quantizer stands in the graph between insertion and lowering.

    y = FakeQuantize(x, scale, zero_point) {qmin, qmax, axis?, on_grid}

One node per quantized tensor keeps the passes in between simple: the gradient of a quantizer is one rule,
and each product lowers it in the form that serves it best (`rewriter.lowering`). The node never reaches a
file.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import onnx_ir as ir

from rewriter.quantization import IntegerRange

DOMAIN: Final = "qat"
OP_TYPE: Final = "FakeQuantize"


@dataclasses.dataclass(frozen=True)
class FakeQuantize:
    """A FakeQuantize node, read."""

    node: ir.Node
    x: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    range: IntegerRange
    axis: int | None
    on_grid: bool

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


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
    x, scale, zero_point = node.inputs
    assert x is not None
    assert scale is not None
    assert zero_point is not None
    axis = node.attributes.get("axis")
    return FakeQuantize(
        node=node,
        x=x,
        scale=scale,
        zero_point=zero_point,
        range=IntegerRange(node.attributes["qmin"].as_int(), node.attributes["qmax"].as_int()),
        axis=None if axis is None else axis.as_int(),
        on_grid=bool(node.attributes["on_grid"].as_int()),
    )
