"""Placement: which tensor gets which quantizer, which share one, what is skipped and why. Decides only.

Rules, for the policy of the recipe's target (`rewriter.targets`):

1. Inputs and results of every quantized operator are quantized, one quantizer a tensor. A result is quantized
   for all its readers; an input that a float operator makes is quantized for its quantized readers only. The
   result of an operator whose integer kernel can write float, and that nothing quantized reads, stays float.
2. No quantizer stands between an operator and the bias Add or activation that the target fuses with it.
3. Weights are symmetric with a narrow range, per output channel where one axis says it. Layers that share a
   weight share its quantizer when they agree on bits and axis; otherwise each has its own.
4. Tensors on both sides of an operator that only moves data share a quantizer (`placement.ranges`).
5. Bits and symmetry of a shared activation quantizer are those of the operator that makes one of its tensors
   (of several, the one with the most bits, the first of these); when float operators make them all, those of
   the operator that reads one, chosen alike. An override thus always governs the results of its nodes.
6. Biases are not quantized here: their scale follows from input and weight (`rewriter.finalize`).
7. Tensors that the model came with a quantizer for keep it (`existing`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.names import FreeNames
from rewriter.operators import unquantized
from rewriter.placement.candidates import Candidate, find_candidates
from rewriter.placement.ranges import QuantizedRanges, existing_scales, share_ranges
from rewriter.placement.settings import NodeSettings, require_matches
from rewriter.placement.signals import find_signals
from rewriter.quantization import IntegerRange, Plan, QuantizedTensor, Quantizer, Skipped
from rewriter.recipe import RangeSource, Recipe
from rewriter.targets import TARGETS

__all__ = ["place"]


def place(model: ir.Model, recipe: Recipe) -> Plan:
    """Decide on the quantizers of a normalized model; the model is not changed.

    Returns:
        quantizers and nodes in graph order. Every Conv, ConvTranspose, Gemm and MatMul of the model is in
        `quantized_nodes` or `skipped`; one in both is quantized in a coarser way than the recipe asks.

    Raises:
        QatError: `recipe_scope_unmatched`, `nothing_to_quantize`.
    """
    graph = model.graph
    policy = TARGETS[recipe.target]
    require_matches(graph.all_nodes(), recipe)
    candidates, skipped = find_candidates(graph, recipe, policy, find_signals(graph))
    if not candidates:
        raise QatError(
            ErrorCode.NOTHING_TO_QUANTIZE,
            "No operator of the model can be quantized for the target "
            f"{recipe.target!r}{_first_reason(skipped)}; see the recipe's scope and overrides.",
        )
    ranges = share_ranges(graph, candidates, recipe, policy)
    order = {node: index for index, node in enumerate(graph)}

    drafts = [
        *_existing_drafts(graph, order, recipe),
        *_weight_drafts(candidates, order),
        *_activation_drafts(graph, candidates, ranges, order),
    ]
    notes = [note for candidate in candidates if (note := _coarser_weight(candidate)) is not None]
    return Plan(
        quantizers=_named(_merged(drafts), FreeNames(model)),
        skipped=tuple(_sorted_skipped([*skipped, *notes], graph)),
        quantized_nodes=tuple(candidate.node.name or "" for candidate in candidates),
    )


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A quantizer without its name; `position` orders drafts as their tensors come in the graph."""

    position: tuple[int, int]
    quantizer: Quantizer
    existing_scale: ir.Value | None = None


def _weight_drafts(candidates: Sequence[Candidate], order: Mapping[ir.Node, int]) -> list[_Draft]:
    readers: dict[tuple[ir.Value, int, int | None, RangeSource, int], list[ir.Node]] = {}
    for candidate in candidates:
        weight = candidate.weight
        if weight is None or candidate.node.inputs[weight.index] is not weight.value:
            continue  # no weight, or one that came with a quantizer
        axis = weight.axis if candidate.settings.per_channel else None
        if axis is not None and weight.value.shape is not None and weight.value.shape[axis] == 1:
            axis = None  # one channel has one scale; onnxruntime's QGemm does not take it as a vector
        settings = candidate.settings
        key = (weight.value, settings.weight_bits, axis, settings.ranges, settings.quant_delay)
        readers.setdefault(key, []).append(candidate.node)
    return [
        _Draft(
            position=(order[nodes[0]], 0),
            quantizer=Quantizer(
                name=value.name or "",
                kind="weight",
                bits=bits,
                range=IntegerRange.for_weights(bits),
                symmetric=True,
                axis=axis,
                tensors=(QuantizedTensor(value.name or "", _names(nodes)),),
                ranges=ranges,
                quant_delay=quant_delay,
            ),
        )
        for (value, bits, axis, ranges, quant_delay), nodes in readers.items()
    ]


def _activation_drafts(
    graph: ir.Graph, candidates: Sequence[Candidate], ranges: QuantizedRanges, order: Mapping[ir.Node, int]
) -> list[_Draft]:
    scales = existing_scales(graph)
    makers = {candidate.output: candidate for candidate in candidates}
    readers: dict[ir.Value, list[Candidate]] = {}
    for candidate in candidates:
        for value in candidate.inputs:
            readers.setdefault(unquantized(value), []).append(candidate)

    drafts = []
    for group in ranges.groups:
        settings = _widest(makers[value] for value in group if value in makers) or _widest(
            reader for value in group for reader in readers.get(value, ())
        )
        assert settings is not None
        quantizer = Quantizer(
            name=group[0].name or "",
            kind="activation",
            bits=settings.activation_bits,
            range=IntegerRange.for_activations(settings.activation_bits, symmetric=settings.symmetric),
            symmetric=settings.symmetric,
            axis=None,
            tensors=tuple(_quantized_tensor(value, ranges, order) for value in group),
            ranges=settings.ranges,
            quant_delay=settings.quant_delay,
        )
        scale = next((scales[value] for value in group if value in scales), None)
        drafts.append(_Draft((_made_at(group[0], order), 1), quantizer, scale))
    return drafts


def _quantized_tensor(
    value: ir.Value, ranges: QuantizedRanges, order: Mapping[ir.Node, int]
) -> QuantizedTensor:
    produced = value in ranges.produced
    nodes = _readers(value) if produced else ranges.consumed[value]
    return QuantizedTensor(
        name=value.name or "",
        consumers=_names(sorted(set(nodes), key=lambda node: order.get(node, len(order)))),
        on_grid=value in ranges.on_grid,
        graph_output=produced and value.is_graph_output(),
    )


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read the tensor, past the quantizers that it came with."""
    nodes: list[ir.Node] = []
    for use in value.uses():
        if is_fake_quantize(use.node):
            nodes.extend(later.node for later in use.node.outputs[0].uses())
        else:
            nodes.append(use.node)
    return nodes


def _widest(candidates: Iterable[Candidate]) -> NodeSettings | None:
    return max(
        (candidate.settings for candidate in candidates),
        key=lambda settings: settings.activation_bits,
        default=None,
    )


def _existing_drafts(graph: ir.Graph, order: Mapping[ir.Node, int], recipe: Recipe) -> list[_Draft]:
    by_scale: dict[ir.Value, list[FakeQuantize]] = {}
    for node in graph:
        if is_fake_quantize(node):
            quantizer = read(node)
            by_scale.setdefault(quantizer.scale, []).append(quantizer)
    return [_existing_draft(found, order, recipe) for found in by_scale.values()]


def _existing_draft(found: Sequence[FakeQuantize], order: Mapping[ir.Node, int], recipe: Recipe) -> _Draft:
    first = found[0]
    zero_point = first.zero_point.const_value
    is_weight = first.x.const_value is not None
    quantizer = Quantizer(
        name=(first.scale.name or "").removesuffix("_scale"),
        kind="weight" if is_weight else "activation",
        bits=(first.range.qmax - first.range.qmin).bit_length(),
        range=first.range,
        symmetric=first.range.qmin < 0 and zero_point is not None and not zero_point.numpy().any(),
        axis=first.axis,
        tensors=tuple(
            QuantizedTensor(
                name=one.x.name or "",
                consumers=_names(use.node for use in one.output.uses()),
                on_grid=one.on_grid,
                graph_output=one.output.is_graph_output(),
            )
            for one in found
        ),
        ranges=recipe.ranges,
        quant_delay=recipe.quant_delay,
        existing=True,
    )
    position = (order[first.node], 0) if is_weight else (_made_at(first.x, order), 1)
    return _Draft(position, quantizer, first.scale)


def _merged(drafts: Iterable[_Draft]) -> list[Quantizer]:
    """In graph order, with what joins an existing quantizer added to it."""
    existing: dict[ir.Value, _Draft] = {}
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


def _coarser_weight(candidate: Candidate) -> Skipped | None:
    weight = candidate.weight
    if weight is None or weight.axis is not None or not candidate.settings.per_channel:
        return None
    return Skipped(
        candidate.node.name or "",
        candidate.node.op_type,
        f"quantized with one scale for the whole weight: {weight.why_no_axis}",
    )


def _sorted_skipped(skipped: Iterable[Skipped], graph: ir.Graph) -> list[Skipped]:
    order = {node.name: index for index, node in enumerate(graph.all_nodes())}
    return sorted(skipped, key=lambda one: order.get(one.node, len(order)))


def _first_reason(skipped: Sequence[Skipped]) -> str:
    return f" (first: {skipped[0].op} {skipped[0].node!r}: {skipped[0].reason})" if skipped else ""


def _made_at(value: ir.Value, order: Mapping[ir.Node, int]) -> int:
    producer = value.producer()
    return -1 if producer is None else order.get(producer, -1)


def _names(nodes: Iterable[ir.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.name or "" for node in nodes))
