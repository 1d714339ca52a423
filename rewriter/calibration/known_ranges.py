"""Activation ranges that the graph itself tells: batch-norm statistics and operators with bounded results.

A range is known where batch norm normalized the tensor (mean and standard deviation per channel), where the
operator bounds its result (Sigmoid, Softmax, Clip, ...) and wherever such a range passes through a monotone
operator or one that only moves data. Means over a whole axis are known from bounds only: how much they vary
does not follow from the statistics of single values, which are several times wider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.operators import movement_inputs, traits_of
from rewriter.quantization import Statistics

# Clipping points, in standard deviations, with the least expected squared quantization error of normally
# distributed values, by bits (Banner et al. 2019, "Post training 4-bit quantization", ACIQ; from 9 bits on by
# the same formula: the minimum over a of a^2 / (3 * 4^bits) + 2 * ((1 + a^2) * Q(a) - a * phi(a))).
_STANDARD_DEVIATIONS: Final[Mapping[int, float]] = {
    2: 1.71,
    3: 2.15,
    4: 2.55,
    5: 2.93,
    6: 3.28,
    7: 3.61,
    8: 3.92,
    9: 4.22,
    10: 4.49,
    11: 4.76,
    12: 5.01,
    13: 5.26,
    14: 5.49,
    15: 5.72,
    16: 5.94,
}


@dataclasses.dataclass(frozen=True)
class KnownRange:
    """Values lie in [low, high]: exactly, or for all but the tails of a distribution."""

    low: float
    high: float
    from_statistics: bool

    def clipped(self, low: float, high: float) -> KnownRange:
        return dataclasses.replace(
            self, low=min(max(self.low, low), high), high=max(min(self.high, high), low)
        )

    def union(self, other: KnownRange) -> KnownRange:
        return KnownRange(
            min(self.low, other.low),
            max(self.high, other.high),
            self.from_statistics or other.from_statistics,
        )


def known_ranges(graph: ir.Graph, statistics: Statistics, bits: int) -> dict[str, KnownRange]:
    """The tensors of the main graph whose range is known, by name."""
    deviations = _STANDARD_DEVIATIONS[bits]
    ranges: dict[str, KnownRange] = {}
    for node in graph:
        for output in node.outputs:
            name = output.name or ""
            if name in statistics:
                mean, deviation = statistics[name]
                spread = deviations * np.abs(deviation)
                low, high = float(np.min(mean - spread)), float(np.max(mean + spread))
                if np.isfinite([low, high]).all():
                    ranges[name] = KnownRange(low, high, True)
        known = _range_of(node, ranges)
        if known is not None:
            for output in node.outputs:
                ranges.setdefault(output.name or "", known)
    return ranges


def _range_of(node: ir.Node, ranges: Mapping[str, KnownRange]) -> KnownRange | None:
    traits = traits_of(node)
    if node.domain != "":
        return None
    if node.op_type in _BOUNDED:
        return KnownRange(*_BOUNDED[node.op_type], from_statistics=False)
    if traits is not None and traits.kind == "movement" and traits.only_moves(node):
        return _union([ranges.get(value.name or "") for value in movement_inputs(node, traits)])
    rule = _RULES.get(node.op_type)
    first = node.inputs[0] if node.inputs else None
    if rule is None or first is None:
        return None
    return rule(node, ranges.get(first.name or ""))


def _union(parts: list[KnownRange | None]) -> KnownRange | None:
    union = None
    for part in parts:
        if part is None:
            return None
        union = part if union is None else union.union(part)
    return union


def _relu(node: ir.Node, x: KnownRange | None) -> KnownRange | None:
    return None if x is None else x.clipped(0.0, float("inf"))


def _clip(node: ir.Node, x: KnownRange | None) -> KnownRange | None:
    low, high = (_scalar(node, index) for index in (1, 2))
    if x is not None:
        return x.clipped(-np.inf if low is None else low, np.inf if high is None else high)
    bounded = low is not None and high is not None and low <= high and abs(low) < 1e6 and abs(high) < 1e6
    return KnownRange(low, high, False) if bounded and low is not None and high is not None else None


def _hard_swish(node: ir.Node, x: KnownRange | None) -> KnownRange | None:
    # Its minimum is -0.375, at -1.5; above 0 it lies under x.
    return None if x is None else x.clipped(-0.375, float("inf"))


def _same(node: ir.Node, x: KnownRange | None) -> KnownRange | None:
    return x


def _mean(node: ir.Node, x: KnownRange | None) -> KnownRange | None:
    return None if x is None or x.from_statistics else x


def _scalar(node: ir.Node, index: int) -> float | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    constant = constant_array(value)
    return float(constant.reshape(())) if constant is not None and constant.size == 1 else None


_BOUNDED: Final[Mapping[str, tuple[float, float]]] = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Hardmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Erf": (-1.0, 1.0),
    "Softsign": (-1.0, 1.0),
    "Sin": (-1.0, 1.0),
    "Cos": (-1.0, 1.0),
}

_RULES: Final[Mapping[str, Callable[[ir.Node, KnownRange | None], KnownRange | None]]] = {
    "Relu": _relu,
    "Clip": _clip,
    "HardSwish": _hard_swish,
    **dict.fromkeys(("AveragePool", "GlobalMaxPool"), _same),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _mean),
}
