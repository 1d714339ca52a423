"""Which element-wise operators are worth integers: those between integers.

An integer Add costs a quantizer for its result and one for each operand. That pays where something reads the
result in integers, or where the operands are integers already. A residual Add of a transformer is neither:
a matrix product wrote its one operand in float and a normalization the other, and a normalization reads the
sum. In float it is faster, and the residual stream keeps its accuracy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from rewriter.operators import unquantized
from rewriter.placement.candidates import Candidate
from rewriter.placement.drafts import readers
from rewriter.placement.ranges import Move
from rewriter.quantization import Skipped
from rewriter.targets import IntegerOperators

_REASON = (
    "nothing reads its result in integers, and not all of its operands are integers: faster in float "
    "(an override with quantize true quantizes it)"
)


def keep_between_integers(
    candidates: Sequence[Candidate],
    moves: Mapping[ir.Node, Move],
    existing: Collection[ir.Value],
    operators: IntegerOperators,
) -> tuple[list[Candidate], list[Skipped]]:
    """Leave out the candidates, given in graph order, that stand between float operators.

    Args:
        existing: tensors that the model came with quantizers for.
    """
    kept = {candidate.node: candidate for candidate in candidates}
    floating: list[Candidate] = []
    for candidate in reversed(candidates):  # what a sum in float reads is not read in integers by it
        if (
            candidate.node.op_type in operators.between_integers
            and not candidate.settings.demanded
            and not _is_read_in_integers(candidate.output, kept, moves, existing)
        ):
            floating.append(kept.pop(candidate.node))

    integers = set(existing) | _integers_of(kept.values(), operators, moves)
    for candidate in reversed(floating):
        if all(_is_integers(value, integers, moves) for value in candidate.inputs):
            kept[candidate.node] = candidate
            integers.add(candidate.output)
    skipped = [
        Skipped(one.node.name or "", one.node.op_type, _REASON) for one in candidates if one.node not in kept
    ]
    return [candidate for candidate in candidates if candidate.node in kept], skipped


def _is_read_in_integers(
    value: ir.Value,
    kept: Mapping[ir.Node, Candidate],
    moves: Mapping[ir.Node, Move],
    existing: Collection[ir.Value],
) -> bool:
    """Whether a kept candidate reads the tensor or what moves make of it, or the model quantizes it."""
    pending, seen = [value], {value}
    while pending:
        tensor = pending.pop()
        if tensor in existing:
            return True
        for node in readers(tensor):
            if node in kept:
                return True
            moved = [
                output for output in (moves[node].outputs if node in moves else ()) if output not in seen
            ]
            seen.update(moved)
            pending.extend(moved)
    return False


def _integers_of(
    candidates: Collection[Candidate], operators: IntegerOperators, moves: Mapping[ir.Node, Move]
) -> set[ir.Value]:
    """Tensors that quantized operators read, as they are or moved, and what they write in integers alone."""
    writing = (one for one in candidates if one.node.op_type not in operators.writes_float)
    values = {candidate.output for candidate in writing}
    pending = [value for candidate in candidates for value in candidate.inputs]
    while pending:
        tensor = unquantized(pending.pop())
        if tensor not in values:
            values.add(tensor)
            producer = tensor.producer()
            if producer is not None and producer in moves:
                pending.extend(moves[producer].inputs)
    return values


def _is_integers(value: ir.Value, integers: Collection[ir.Value], moves: Mapping[ir.Node, Move]) -> bool:
    """Whether the tensor is one of `integers`, or moves make it of them alone."""
    pending = [value]
    while pending:
        tensor = unquantized(pending.pop())
        producer = tensor.producer()
        if tensor in integers:
            continue
        if producer is None or producer not in moves:
            return False
        pending.extend(moves[producer].inputs)
    return True
