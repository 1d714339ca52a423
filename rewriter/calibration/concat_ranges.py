"""Tells where the inputs of a Concat, which share one range, have very different ones of their own.

The grid of the widest input is all that the narrowest gets: at a tenth of the width, less than 5 of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import onnx_ir as ir

from rewriter.calibration.observers import Extremes
from rewriter.operators import is_operator
from rewriter.quantization import FloatArray, Quantizer

LARGEST_RATIO: Final = 10.0


class Member(Extremes):
    """The extremes of one tensor of those that share an observer; its values go on to that."""

    def __init__(self, shared: Extremes) -> None:
        super().__init__()
        self._shared = shared

    def update(self, values: FloatArray) -> None:
        super().update(values)
        self._shared.update(values)


def concat_inputs(graph: ir.Graph, quantizers: Iterable[Quantizer]) -> dict[str, dict[str, tuple[str, ...]]]:
    """By quantizer, the Concats whose output and inputs it quantizes: output -> inputs, two or more."""
    owners = {tensor.name: quantizer.name for quantizer in quantizers for tensor in quantizer.tensors}
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for node in graph:
        if not is_operator(node, "Concat"):
            continue
        output = node.outputs[0].name or ""
        owner = owners.get(output)
        inputs = dict.fromkeys(value.name or "" for value in node.inputs if value is not None)
        shared = tuple(name for name in inputs if owners.get(name) == owner)
        if owner is not None and len(shared) > 1:
            found.setdefault(owner, {})[output] = shared
    return found


def concat_warning(concats: Mapping[str, tuple[str, ...]], members: Mapping[str, Extremes]) -> str | None:
    """A sentence on the Concat with the largest ratio of widths beyond `LARGEST_RATIO`."""
    worst, sentence = LARGEST_RATIO, None
    for output, inputs in concats.items():
        widths = {name: _width(members[name]) for name in inputs if name in members}
        widths = {name: width for name, width in widths.items() if width > 0}
        if not widths:
            continue
        wide, narrow = max(widths, key=widths.__getitem__), min(widths, key=widths.__getitem__)
        ratio = widths[wide] / widths[narrow]
        if ratio > worst:
            worst = ratio
            sentence = (
                f"The inputs of the Concat that makes {output!r} share one range, but {wide!r} is "
                f"{ratio:.3g} times as wide as {narrow!r}, which keeps few of the integers."
            )
    return sentence


def _width(extremes: Extremes) -> float:
    """Of the range with 0 in it, as a quantizer covers it."""
    return max(extremes.high, 0.0) - min(extremes.low, 0.0)
