"""The quantizers of a graph as training sees them: one scale, one zero point, the nodes that share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.fake_quantize import FakeQuantize
from rewriter.initializers import initializer_array
from rewriter.operators import is_constant
from rewriter.quantization import IntegerRange, Quantizer
from rewriter.recipe import RangeSource, Recipe


@dataclasses.dataclass(frozen=True)
class GraphQuantizer:
    """Initializers of a quantizer and its FakeQuantize nodes, in graph order.

    Attributes:
        symmetric: the zero point is 0 of the signed integers, and stays.
        weight: of a weight, not of an activation.
    """

    name: str
    scale: ir.Value
    zero_point: ir.Value
    scale_name: str
    zero_point_name: str
    nodes: tuple[FakeQuantize, ...]
    ranges: RangeSource
    quant_delay: int
    symmetric: bool
    weight: bool

    @property
    def range(self) -> IntegerRange:
        return self.nodes[0].range

    @property
    def axis(self) -> int | None:
        return self.nodes[0].axis


def graph_quantizers(graph: ir.Graph, planned: Iterable[Quantizer], recipe: Recipe) -> list[GraphQuantizer]:
    """The quantizers that training acts on, in graph order; what is on the grid already is left out.

    Quantizers that no plan names are what the recipe says of all.
    """
    by_scale: dict[ir.Value, list[FakeQuantize]] = {}
    for node in graph:
        if fake_quantize.is_fake_quantize(node):
            quantizer = fake_quantize.read(node)
            by_scale.setdefault(quantizer.scale, []).append(quantizer)
    plans = {quantizer.scale_name: quantizer for quantizer in planned}
    return [
        _quantizer(scale, nodes, plans.get(scale.name or ""), recipe) for scale, nodes in by_scale.items()
    ]


def _quantizer(
    scale: ir.Value, nodes: list[FakeQuantize], plan: Quantizer | None, recipe: Recipe
) -> GraphQuantizer:
    zero_point, range_ = nodes[0].zero_point, nodes[0].range
    at_zero = range_.qmin < 0 and not np.any(initializer_array(zero_point))
    return GraphQuantizer(
        name=(scale.name or "").removesuffix("_scale"),
        scale=scale,
        zero_point=zero_point,
        scale_name=scale.name or "",
        zero_point_name=zero_point.name or "",
        nodes=tuple(nodes),
        ranges=recipe.ranges if plan is None else plan.ranges,
        quant_delay=recipe.quant_delay if plan is None else plan.quant_delay,
        symmetric=at_zero if plan is None else plan.symmetric,
        weight=is_constant(nodes[0].x) if plan is None else plan.kind == "weight",
    )
