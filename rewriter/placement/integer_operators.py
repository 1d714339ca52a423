"""Placement for a runtime that computes whole operators in integers.

Rules, for the operators of the target (`rewriter.targets`):

1. Inputs and results of every quantized operator are quantized, one quantizer a tensor. A result is quantized
   for all its readers; an input that a float operator makes is quantized for its quantized readers only. The
   result of an operator whose integer kernel can write float, and that nothing quantized reads, stays float.
2. No quantizer stands between an operator and the bias Add or activation that the target fuses with it.
3. Weights have a narrow range, symmetric if the target says so, per output channel where one axis says it.
   Layers that share a weight share its quantizer when they agree on it; otherwise each has its own.
4. Tensors on both sides of an operator that only moves data share a quantizer (`placement.ranges`).
5. Bits and symmetry of a shared activation quantizer are those of the operator that makes one of its tensors
   (of several, the one with the most bits, the first of these); when float operators make them all, those of
   the operator that reads one, chosen alike. An override thus always governs the results of its nodes.
6. Biases are not quantized here: their scale follows from input and weight (`rewriter.finalize`).
7. An Add or Mul that nothing reads in integers stays float, unless all its operands are integers already or
   an override demands it (`placement.elementwise`).
8. Tensors that the model came with a quantizer for keep it (`existing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from rewriter.operators import unquantized
from rewriter.placement.candidates import Candidate, find_candidates
from rewriter.placement.drafts import (
    Decision,
    Draft,
    Order,
    activation_position,
    coarser_weight,
    names_of,
    order_of,
    readers,
    sorted_names,
    weight_axis,
    weight_position,
)
from rewriter.placement.elementwise import keep_between_integers
from rewriter.placement.ranges import QuantizedRanges, existing_scales, read_moves, share_ranges
from rewriter.placement.settings import NodeSettings
from rewriter.placement.signals import find_signals
from rewriter.quantization import IntegerRange, QuantizedTensor, Quantizer, Skipped
from rewriter.recipe import RangeSource, Recipe
from rewriter.targets import IntegerOperators, TargetPolicy


def decide(graph: ir.Graph, recipe: Recipe, policy: TargetPolicy, operators: IntegerOperators) -> Decision:
    """Every Conv, ConvTranspose, Gemm and MatMul is in `quantized_nodes` or `skipped`; one in both is
    quantized in a coarser way than the recipe asks."""
    candidates, skipped = find_candidates(graph, recipe, operators, find_signals(graph))
    moves = read_moves(graph, recipe, operators)
    candidates, floating = keep_between_integers(candidates, moves, existing_scales(graph), operators)
    ranges = share_ranges(graph, candidates, moves, operators)
    order = order_of(graph)
    notes = [
        Skipped(one.node.name or "", one.node.op_type, note)
        for one in candidates
        if (note := _coarser_weight(one, policy)) is not None
    ]
    return Decision(
        drafts=[
            *_weight_drafts(candidates, policy, order),
            *_activation_drafts(graph, candidates, ranges, order),
        ],
        skipped=[*skipped, *floating, *notes],
        quantized_nodes=[candidate.node for candidate in candidates],
    )


def _weight_drafts(candidates: Sequence[Candidate], policy: TargetPolicy, order: Order) -> list[Draft]:
    sharers: dict[tuple[ir.Value, int, bool, int | None, RangeSource, int], list[ir.Node]] = {}
    for candidate in candidates:
        weight = candidate.weight
        if weight is None or candidate.node.inputs[weight.index] is not weight.value:
            continue  # no weight, or one that came with a quantizer
        settings = candidate.settings
        symmetric = policy.symmetric_weights or settings.symmetric
        axis = weight_axis(weight, settings, symmetric=symmetric)
        key = (weight.value, settings.weight_bits, symmetric, axis, settings.ranges, settings.quant_delay)
        sharers.setdefault(key, []).append(candidate.node)
    return [
        Draft(
            position=weight_position(nodes, order),
            quantizer=Quantizer(
                name=value.name or "",
                kind="weight",
                bits=bits,
                range=IntegerRange.for_weights(bits, symmetric=symmetric),
                symmetric=symmetric,
                axis=axis,
                tensors=(QuantizedTensor(value.name or "", names_of(nodes)),),
                ranges=ranges,
                quant_delay=quant_delay,
            ),
        )
        for (value, bits, symmetric, axis, ranges, quant_delay), nodes in sharers.items()
    ]


def _coarser_weight(candidate: Candidate, policy: TargetPolicy) -> str | None:
    symmetric = policy.symmetric_weights or candidate.settings.symmetric
    return coarser_weight(candidate.weight, candidate.settings, symmetric=symmetric)


def _activation_drafts(
    graph: ir.Graph, candidates: Sequence[Candidate], ranges: QuantizedRanges, order: Order
) -> list[Draft]:
    scales = existing_scales(graph)
    makers = {candidate.output: candidate for candidate in candidates}
    quantized_readers: dict[ir.Value, list[Candidate]] = {}
    for candidate in candidates:
        for value in candidate.inputs:
            quantized_readers.setdefault(unquantized(value), []).append(candidate)

    drafts = []
    for group in ranges.groups:
        settings = _widest(makers[value] for value in group if value in makers) or _widest(
            reader for value in group for reader in quantized_readers.get(value, ())
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
        drafts.append(Draft(activation_position(group[0], order), quantizer, scale))
    return drafts


def _quantized_tensor(value: ir.Value, ranges: QuantizedRanges, order: Order) -> QuantizedTensor:
    produced = value in ranges.produced
    return QuantizedTensor(
        name=value.name or "",
        consumers=sorted_names(readers(value) if produced else ranges.consumed[value], order),
        on_grid=value in ranges.on_grid,
        graph_output=produced and value.is_graph_output(),
    )


def _widest(candidates: Iterable[Candidate]) -> NodeSettings | None:
    return max(
        (candidate.settings for candidate in candidates),
        key=lambda settings: settings.activation_bits,
        default=None,
    )
