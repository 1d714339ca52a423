"""From decided quantizers to a plan: those that the model came with, one order, unique names.

What decides (`placement.integer_operators`, `placement.tf_contrib`) returns a `Decision`; `plan_of` makes a
plan of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.names import FreeNames
from rewriter.operators import WeightOperand
from rewriter.placement.settings import NodeSettings, in_scope, settings_for
from rewriter.quantization import Plan, QuantizedTensor, Quantizer, Skipped
from rewriter.recipe import RangeSource, Recipe

# Position of each node of the main graph.
Order = Mapping[ir.Node, int]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A quantizer without its name; `position` orders drafts as their tensors come in the graph.

    Attributes:
        existing_scale: scale of the quantizer that the model came with for one of the tensors, which the
            others join.
    """

    position: tuple[int, int]
    quantizer: Quantizer
    existing_scale: ir.Value | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a target's rules say about a graph, apart from the quantizers that it came with."""

    drafts: Sequence[Draft]
    skipped: Sequence[Skipped]
    quantized_nodes: Sequence[ir.Node]


def order_of(graph: ir.Graph) -> Order:
    return {node: index for index, node in enumerate(graph)}


def plan_of(decision: Decision, model: ir.Model, recipe: Recipe) -> Plan:
    """Quantizers and nodes in graph order, with the quantizers that the model came with."""
    drafts = [*_existing_drafts(model.graph, recipe), *decision.drafts]
    return Plan(
        quantizers=_named(_merged(drafts), FreeNames(model)),
        skipped=tuple(_sorted_skipped(decision.skipped, model.graph)),
        quantized_nodes=names_of(decision.quantized_nodes),
    )


def weight_axis(weight: WeightOperand, settings: NodeSettings, *, symmetric: bool) -> int | None:
    """Quantization axis of a weight, None for one scale."""
    if not settings.per_channel or not symmetric:
        return None
    axis = weight.axis
    if axis is not None and weight.value.shape is not None and weight.value.shape[axis] == 1:
        return None  # one channel has one scale; onnxruntime's QGemm does not take it as a vector
    return axis


def coarser_weight(weight: WeightOperand | None, settings: NodeSettings, *, symmetric: bool) -> str | None:
    """A note where the recipe asks for one scale per channel and the weight cannot have them."""
    if weight is None or not settings.per_channel or (symmetric and weight.axis is not None):
        return None
    why = weight.why_no_axis if symmetric else "onnxruntime's QLinearConv takes no zero point per channel"
    return f"quantized with one scale for the whole weight: {why}"


def activation_position(value: ir.Value, order: Order) -> tuple[int, int]:
    producer = value.producer()
    return (-1 if producer is None else order.get(producer, -1)), 1


def weight_position(readers: Iterable[ir.Node], order: Order) -> tuple[int, int]:
    return min(order.get(node, len(order)) for node in readers), 0


def readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read the tensor, past the quantizers that it came with; one that reads it twice is twice
    among them."""
    nodes: list[ir.Node] = []
    for use in value.uses():
        if is_fake_quantize(use.node):
            nodes.extend(later.node for later in use.node.outputs[0].uses())
        else:
            nodes.append(use.node)
    return nodes


def names_of(nodes: Iterable[ir.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.name or "" for node in nodes))


def sorted_names(nodes: Iterable[ir.Node], order: Order) -> tuple[str, ...]:
    """In graph order; nodes inside bodies last."""
    return names_of(sorted(set(nodes), key=lambda node: order.get(node, len(order))))


def _existing_drafts(graph: ir.Graph, recipe: Recipe) -> list[Draft]:
    order = order_of(graph)
    by_scale: dict[ir.Value, list[FakeQuantize]] = {}
    for node in graph:
        if is_fake_quantize(node):
            quantizer = read(node)
            by_scale.setdefault(quantizer.scale, []).append(quantizer)
    return [_existing_draft(found, order, recipe) for found in by_scale.values()]


def _existing_draft(found: Sequence[FakeQuantize], order: Order, recipe: Recipe) -> Draft:
    first = found[0]
    zero_point = first.zero_point.const_value
    is_weight = first.x.const_value is not None
    symmetric = first.range.qmin < 0 and zero_point is not None and not zero_point.numpy().any()
    owner = _owner(first)
    settings = settings_for(owner, recipe)
    ranges: RangeSource = settings.ranges if in_scope(owner, recipe) else "fixed"
    if ranges == "moving_average" and first.axis is not None and not symmetric:
        ranges = "fixed"  # tracked zero points differ by channel, which QLinearConv does not take
    quantizer = Quantizer(
        name=(first.scale.name or "").removesuffix("_scale"),
        kind="weight" if is_weight else "activation",
        bits=(first.range.qmax - first.range.qmin).bit_length(),
        range=first.range,
        symmetric=symmetric,
        axis=first.axis,
        tensors=tuple(
            QuantizedTensor(
                name=one.x.name or "",
                consumers=names_of(use.node for use in one.output.uses()),
                on_grid=one.on_grid,
                graph_output=one.output.is_graph_output(),
            )
            for one in found
        ),
        ranges=ranges,
        quant_delay=settings.quant_delay if in_scope(owner, recipe) else 0,
        existing=True,
    )
    position = (order[first.node], 0) if is_weight else activation_position(first.x, order)
    return Draft(position, quantizer, first.scale)


def _owner(quantizer: FakeQuantize) -> ir.Node:
    """The node whose settings apply: what makes the tensor, else what reads it."""
    producer = quantizer.x.producer()
    if producer is not None:
        return producer
    return next((use.node for use in quantizer.output.uses()), quantizer.node)


def _merged(drafts: Iterable[Draft]) -> list[Quantizer]:
    """In graph order, with what joins an existing quantizer added to it."""
    existing: dict[ir.Value, Draft] = {}
    others = []
    for draft in drafts:
        scale = draft.existing_scale
        if scale is None:
            others.append(draft)
        elif scale not in existing:
            existing[scale] = draft
        else:
            tensors = {tensor.name: tensor for tensor in existing[scale].quantizer.tensors}
            for tensor in draft.quantizer.tensors:
                tensors[tensor.name] = _joined(tensors.get(tensor.name), tensor)
            kept = dataclasses.replace(existing[scale].quantizer, tensors=tuple(tensors.values()))
            existing[scale] = dataclasses.replace(existing[scale], quantizer=kept)
    ordered = sorted([*existing.values(), *others], key=lambda draft: draft.position)
    return [draft.quantizer for draft in ordered]


def _joined(found: QuantizedTensor | None, added: QuantizedTensor) -> QuantizedTensor:
    if found is None:
        return added
    consumers = tuple(dict.fromkeys((*found.consumers, *added.consumers)))
    return dataclasses.replace(
        found, consumers=consumers, graph_output=found.graph_output or added.graph_output
    )


def _named(quantizers: Iterable[Quantizer], names: FreeNames) -> tuple[Quantizer, ...]:
    suffixes = ("_scale", "_zero_point")
    return tuple(
        q if q.existing else dataclasses.replace(q, name=names.take_stem(q.name, suffixes))
        for q in quantizers
    )


def _sorted_skipped(skipped: Iterable[Skipped], graph: ir.Graph) -> list[Skipped]:
    order = {node.name: index for index, node in enumerate(graph.all_nodes())}
    return sorted(skipped, key=lambda one: order.get(one.node, len(order)))
