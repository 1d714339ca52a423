"""What calibration keeps of a tensor's values: their extremes, or a histogram of fixed size.

Both depend on the values alone, not on their order or on how they came in batches.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from rewriter.quantization import FloatArray

# Bins on each side of zero. The largest magnitude lies in the outer half of its side: an 8-bit step over
# a one-sided range spans 8 to 16 bins.
BINS_PER_SIDE: Final = 4096
_SIDE_EXPONENT: Final = BINS_PER_SIDE.bit_length() - 1
_SMALLEST_EXPONENT: Final = -100
# Values binned at a time: the temporaries stay in the cache.
_CHUNK: Final = 1 << 15


class NotFiniteError(ValueError):
    """The values hold NaN or infinity."""


class Extremes:
    """Smallest and largest value seen; 0 and 0 before the first."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.count = 0

    def update(self, values: FloatArray) -> None:
        """Take in values of any shape; they are not kept.

        Raises:
            NotFiniteError: there is a NaN or an infinity among them.
        """
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFiniteError
        self.low = low if self.count == 0 else min(self.low, low)
        self.high = high if self.count == 0 else max(self.high, high)
        self.count += values.size


class Histogram(Extremes):
    """Counts in bins [i * width, (i + 1) * width), i = -BINS_PER_SIDE .. BINS_PER_SIDE - 1.

    The width is the smallest power of two with which the bins hold every value seen. Doubling it merges
    neighbours, which is exact because floor(floor(x / w) / 2) = floor(x / 2w).
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * BINS_PER_SIDE, np.int64)
        self._exponent = _SMALLEST_EXPONENT

    @property
    def width(self) -> float:
        return 2.0**self._exponent

    def update(self, values: FloatArray) -> None:
        super().update(values)
        self._widen(max(-self.low, self.high))
        inverse = 2.0**-self._exponent
        flat = values.reshape(-1)
        size = min(flat.size, _CHUNK)
        scratch, scratch_indices = np.empty(size, np.float64), np.empty(size, np.int64)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            scaled, indices = scratch[: chunk.size], scratch_indices[: chunk.size]
            np.multiply(chunk, inverse, out=scaled, dtype=np.float64)  # exact: no float32 underflow
            np.floor(scaled, out=scaled)
            np.copyto(indices, scaled, casting="unsafe")
            indices += BINS_PER_SIDE
            self.counts += np.bincount(indices, minlength=2 * BINS_PER_SIDE)

    def _widen(self, largest: float) -> None:
        if largest == 0.0:
            return
        exponent = max(math.frexp(largest)[1] - _SIDE_EXPONENT, _SMALLEST_EXPONENT)
        if not self.counts.any():
            self._exponent = exponent
        # Once everything lies in the two bins at zero, merging changes nothing more.
        for _ in range(min(exponent - self._exponent, _SIDE_EXPONENT + 1)):
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS_PER_SIDE // 2 : BINS_PER_SIDE // 2 + BINS_PER_SIDE] = pairs
        self._exponent = max(exponent, self._exponent)

    def points(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Centres of the bins that hold values, ascending and inside [low, high], and their counts."""
        occupied = np.flatnonzero(self.counts)
        centres = (occupied - BINS_PER_SIDE + 0.5) * self.width
        return np.clip(centres, self.low, self.high), self.counts[occupied]

    def quantile(self, share: float) -> float:
        """The value below which `share` (0..1) of the values lie, interpolated inside its bin."""
        cumulative = np.cumsum(self.counts)
        target = share * cumulative[-1]
        index = int(np.searchsorted(cumulative, target))
        inside = self.counts[index]
        before = cumulative[index] - inside
        fraction = (target - before) / inside if inside else 0.0
        value = (index - BINS_PER_SIDE + fraction) * self.width
        return float(np.clip(value, self.low, self.high))

    def magnitude_quantile(self, share: float) -> float:
        """The magnitude below which `share` (0..1) of the magnitudes lie."""
        folded = Histogram()
        folded.counts[BINS_PER_SIDE:] = self.counts[BINS_PER_SIDE:] + self.counts[:BINS_PER_SIDE][::-1]
        folded._exponent = self._exponent
        folded.low, folded.high = 0.0, max(-self.low, self.high)
        return folded.quantile(share)
