"""What is quantized and what is frozen at a step: the delays in the manifest against the step counter."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

from rewriter.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Phase:
    """Quantizers that act and batch norms that use their running statistics, each of how many.

    Batch norms that were folded once, before the training, do not count: nothing of them is left to freeze.
    """

    quantizers_on: int
    quantizers: int
    batch_norms_frozen: int
    batch_norms: int

    def __str__(self) -> str:
        """`float`, `quantized`, `frozen` (all quantized, too), or how much of it where it is not all or none:
        `quantized 12/20`, `quantized, frozen 3/5`."""
        quantized = self.quantizers_on == self.quantizers
        if quantized and 0 < self.batch_norms_frozen == self.batch_norms:
            return "frozen"
        if self.quantizers_on == 0:
            text = "float"
        else:
            text = "quantized" if quantized else f"quantized {self.quantizers_on}/{self.quantizers}"
        if self.batch_norms_frozen:
            text += f", frozen {self.batch_norms_frozen}/{self.batch_norms}"
        return text


@dataclasses.dataclass(frozen=True)
class Delays:
    """The counter's value at which each begins, in order; batch norms that never freeze only count."""

    quantizers: tuple[int, ...]
    freezing: tuple[int, ...]
    batch_norms: int

    @classmethod
    def of(cls, manifest: Manifest) -> Delays:
        batch_norms = [
            *(entry.freeze_bn_delay for entry in manifest.folded if entry.statistics is not None),
            *(entry.freeze_bn_delay for entry in manifest.batch_norms.trained),
        ]
        return cls(
            _begins(entry.quant_delay for entry in manifest.quantizers),
            _begins(delay for delay in batch_norms if delay is not None),
            len(batch_norms),
        )

    def phase(self, counter: int) -> Phase:
        """Of a training step that brings the counter to this value, or of an evaluation at it."""
        return Phase(
            bisect.bisect_right(self.quantizers, counter),
            len(self.quantizers),
            bisect.bisect_right(self.freezing, counter),
            self.batch_norms,
        )


def _begins(delays: Iterable[int]) -> tuple[int, ...]:
    # The first step is step 1: a delay of 1 is none, in an evaluation before it as well.
    return tuple(sorted(0 if delay == 1 else delay for delay in delays))
