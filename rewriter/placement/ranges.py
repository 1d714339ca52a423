"""Which tensors are quantized, and which of them share one range.

Quantized operators ask for their operands and results. Operators that only move data then pass this on:
the result of moving quantized data is quantized, and what is moved to a quantized operator is quantized
before the move. Both sides share a range. A chain of moves between float operators is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from rewriter.fake_quantize import is_fake_quantize, read
from rewriter.operators import is_constant, movement_inputs, traits_of, unquantized
from rewriter.placement.candidates import Candidate
from rewriter.placement.settings import in_scope, settings_for
from rewriter.recipe import Recipe
from rewriter.targets import IntegerOperators


@dataclasses.dataclass
class QuantizedRanges:
    """The tensors to quantize. Tensors are the float values, before any quantizer.

    Attributes:
        produced: quantized for every reader: results of quantized operators and of moves of quantized data.
        consumed: quantized for these readers only.
        on_grid: results of moves.
        groups: tensors that share a range, each group in graph order.
    """

    produced: set[ir.Value]
    consumed: dict[ir.Value, list[ir.Node]]
    on_grid: set[ir.Value]
    groups: list[list[ir.Value]]


def share_ranges(
    graph: ir.Graph,
    candidates: Sequence[Candidate],
    moves: Mapping[ir.Node, Move],
    operators: IntegerOperators,
) -> QuantizedRanges:
    """Collect what the candidates ask for and extend it over the moves (`read_moves`)."""
    ranges = QuantizedRanges(produced=set(), consumed={}, on_grid=set(), groups=[])
    for candidate in candidates:
        for value in candidate.inputs:
            ranges.consumed.setdefault(unquantized(value), []).append(candidate.node)
        if operators.quantizes_outputs and candidate.node.op_type not in operators.writes_float:
            ranges.produced.add(candidate.output)

    sharing = _DisjointSets(existing_scales(graph))
    done: set[ir.Node] = set()
    _share_over_moves(list(reversed(list(moves))), moves, ranges, sharing, done)
    if operators.quantizes_outputs:
        # A result that could stay float and has a quantized reader is quantized for the others too: the
        # kernel writes either integers or float.
        mixed = [c.output for c in candidates if c.output in ranges.consumed]
        ranges.produced.update(mixed)
        readers = [use.node for value in mixed for use in value.uses() if use.node in moves]
        _share_over_moves(readers, moves, ranges, sharing, done)

    ranges.groups = sharing.groups(_in_graph_order(graph, ranges))
    return ranges


def _share_over_moves(
    pending: list[ir.Node],
    moves: Mapping[ir.Node, Move],
    ranges: QuantizedRanges,
    sharing: _DisjointSets,
    done: set[ir.Node],
) -> None:
    """Quantize both sides of every move that touches quantized tensors, as far as that leads."""
    while pending:
        node = pending.pop()
        if node in done or not _is_active(moves[node], ranges, sharing):
            continue
        done.add(node)
        move = moves[node]
        for value in move.inputs:
            ranges.consumed.setdefault(unquantized(value), []).append(node)
        ranges.produced.update(move.outputs)
        ranges.on_grid.update(move.outputs)
        sharing.join([*map(unquantized, move.inputs), *move.outputs])
        pending.extend(_neighbours(move, moves))


@dataclasses.dataclass(frozen=True)
class Move:
    """The float tensors on both sides of an operator that only moves data."""

    inputs: tuple[ir.Value, ...]  # as they stand in the graph
    outputs: tuple[ir.Value, ...]


def read_moves(graph: ir.Graph, recipe: Recipe, operators: IntegerOperators) -> dict[ir.Node, Move]:
    """The nodes that pass quantized data on, in graph order."""
    return {node: move for node in graph if (move := _read_move(node, recipe, operators)) is not None}


def _read_move(node: ir.Node, recipe: Recipe, operators: IntegerOperators) -> Move | None:
    """The float tensors that a node moves, None where it cannot take part in quantization."""
    traits = traits_of(node)
    if traits is None or traits.kind != "movement" or node.op_type not in operators.shares_range:
        return None
    if not traits.only_moves(node) or not in_scope(node, recipe) or not settings_for(node, recipe).quantize:
        return None
    inputs = tuple(movement_inputs(node, traits))
    # MaxPool's indices have no readers here (only_moves).
    outputs = tuple(node.outputs[:1] if node.op_type == "MaxPool" else node.outputs)
    if not inputs or any(value.dtype != ir.DataType.FLOAT for value in (*inputs, *outputs)):
        return None
    # A constant has no activation range; and what the model quantizes already is left as found.
    if any(is_constant(unquantized(value)) for value in inputs) or any(map(_is_quantized, outputs)):
        return None
    return Move(inputs, outputs)


def existing_scales(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Scale of each tensor that the model came with a quantizer for (the first one, if it has several)."""
    scales: dict[ir.Value, ir.Value] = {}
    for node in graph:
        if is_fake_quantize(node):
            quantizer = read(node)
            scales.setdefault(quantizer.x, quantizer.scale)
    return scales


def _is_quantized(value: ir.Value) -> bool:
    return any(is_fake_quantize(use.node) for use in value.uses())


def _is_active(move: Move, ranges: QuantizedRanges, sharing: _DisjointSets) -> bool:
    """Every input is quantized already, or a quantized operator reads a result."""
    # A scale that came with the model covers its own tensors; others do not join it through a Concat.
    if len({sharing.existing_scale(unquantized(value)) for value in move.inputs}) > 1:
        return False
    if all(unquantized(value) is not value or value in ranges.produced for value in move.inputs):
        return True
    return any(value in ranges.consumed for value in move.outputs)


def _neighbours(move: Move, moves: Mapping[ir.Node, Move]) -> Iterable[ir.Node]:
    for value in move.inputs:
        producer = value.producer()
        if producer is not None and producer in moves:
            yield producer
        yield from (use.node for use in value.uses() if use.node in moves)
    for value in move.outputs:
        yield from (use.node for use in value.uses() if use.node in moves)


def _in_graph_order(graph: ir.Graph, ranges: QuantizedRanges) -> list[ir.Value]:
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    return [value for value in values if value in ranges.produced or value in ranges.consumed]


class _DisjointSets:
    """Union-find over values; a set keeps the scale that one of its values came with."""

    def __init__(self, scales: Mapping[ir.Value, ir.Value]) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}
        self._scales = dict(scales)

    def existing_scale(self, value: ir.Value) -> ir.Value | None:
        return self._scales.get(self._root(value))

    def join(self, values: Sequence[ir.Value]) -> None:
        first = self._root(values[0])
        for value in values[1:]:
            root = self._root(value)
            if root is not first:
                self._parent[root] = first
                if root in self._scales:
                    self._scales.setdefault(first, self._scales[root])

    def groups(self, values: Iterable[ir.Value]) -> list[list[ir.Value]]:
        """The values by group; groups in the order of their first value."""
        by_root: dict[ir.Value, list[ir.Value]] = {}
        for value in values:
            by_root.setdefault(self._root(value), []).append(value)
        return list(by_root.values())

    def _root(self, value: ir.Value) -> ir.Value:
        root = value
        while (parent := self._parent.get(root, root)) is not root:
            root = parent
        while (parent := self._parent.get(value, value)) is not root and parent is not value:
            self._parent[value] = root
            value = parent
        return root
