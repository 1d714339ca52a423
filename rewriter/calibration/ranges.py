"""From observed values to the range that a quantizer covers: minmax, percentile, mse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from rewriter.calibration.observers import Extremes, Histogram
from rewriter.quantization import Quantizer, parameters_from_range
from rewriter.recipe import Calibration

Range = tuple[float, float]

# The mse search shrinks the observed range by these factors (with two sides, each of them), then refines
# round the best by steps of a quarter and a sixteenth. At few bits the error has narrow valleys.
_SMALLEST_SHRINK: Final = 2.0**-5
_STEPS_ONE_SIDED: Final = 120
_STEPS_TWO_SIDED: Final = 20
_REFINEMENTS: Final = (1 / 4, 1 / 16)

# Finer grids than this have several steps to a bin: the histogram cannot tell their ranges apart.
_SEARCHED_BITS: Final = 10


def new_observer(method: str) -> Extremes:
    return Extremes() if method == "minmax" else Histogram()


def choose_range(observer: Extremes, quantizer: Quantizer, calibration: Calibration) -> Range:
    """The range [low, high] of an activation quantizer by the recipe's method."""
    return _METHODS[calibration.method](observer, quantizer, calibration)


def minmax(observer: Extremes, quantizer: Quantizer, calibration: Calibration) -> Range:
    return observer.low, observer.high


def percentile(observer: Extremes, quantizer: Quantizer, calibration: Calibration) -> Range:
    """The range that keeps `calibration.percentile` percent of the values.

    Symmetric: of the magnitudes. Asymmetric: what is cut is split evenly between the two sides; values of
    one sign are cut on their side alone.
    """
    assert isinstance(observer, Histogram)
    share = calibration.percentile / 100.0
    if quantizer.symmetric:
        bound = observer.magnitude_quantile(share)
        return max(-bound, min(observer.low, 0.0)), min(bound, max(observer.high, 0.0))
    if observer.low >= 0:
        return 0.0, observer.quantile(share)
    if observer.high <= 0:
        return observer.quantile(1.0 - share), 0.0
    return observer.quantile((1.0 - share) / 2), observer.quantile((1.0 + share) / 2)


def mse(observer: Extremes, quantizer: Quantizer, calibration: Calibration) -> Range:
    """The range with the least expected squared quantization error, over shrunk copies of the observed one.

    Zero stays on the grid, so that a tensor after a Relu keeps its zeros at qmin.
    """
    assert isinstance(observer, Histogram)
    if quantizer.bits > _SEARCHED_BITS:
        return observer.low, observer.high
    points, counts = observer.points()
    low, high = min(observer.low, 0.0), max(observer.high, 0.0)
    if quantizer.symmetric:
        high = max(-low, high)
        low = -high
    two_sided = low < 0 < high and not quantizer.symmetric
    moments = _Moments(points, counts)
    best_low, best_high = 1.0, 1.0
    steps = _STEPS_TWO_SIDED if two_sided else _STEPS_ONE_SIDED
    step = _SMALLEST_SHRINK ** (1 / steps)
    for exponents in (np.arange(steps), *(np.arange(-4, 5) * part for part in _REFINEMENTS)):
        candidates = step**exponents
        if two_sided:
            shrink_low, shrink_high = (side.ravel() for side in np.meshgrid(candidates, candidates))
        else:
            shrink_low = shrink_high = candidates
        shrink_low = np.minimum(best_low * shrink_low, 1.0)
        shrink_high = np.minimum(best_high * shrink_high, 1.0)
        errors = moments.expected_error(low * shrink_low, high * shrink_high, quantizer)
        best = int(np.argmin(errors))
        best_low, best_high = float(shrink_low[best]), float(shrink_high[best])
    return low * best_low, high * best_high


class _Moments:
    """Prefix sums over weighted points: the squared error of a quantization grid from its cells alone."""

    def __init__(self, points: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> None:
        self._points = points
        weights = counts.astype(np.float64)
        self._sums = [np.concatenate([[0.0], np.cumsum(weights * points**power)]) for power in (0, 1, 2)]

    def expected_error(
        self, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], quantizer: Quantizer
    ) -> npt.NDArray[np.float64]:
        """Sum over the points of count * (x - quantized x)^2, for each candidate range; shape [candidates].

        A cell with grid value y contributes sum x^2 - 2 y sum x + y^2 count.
        """
        scale, zero_point = parameters_from_range(low, high, quantizer.range, symmetric=quantizer.symmetric)
        integers = np.arange(quantizer.range.qmin, quantizer.range.qmax + 1)
        s = scale.astype(np.float64)[:, None]
        grid = (integers[None, :] - zero_point.astype(np.int64)[:, None]) * s
        cuts = np.searchsorted(self._points, grid[:, :-1] + s / 2)
        ends = np.zeros((len(grid), 1), np.intp)
        edges = np.concatenate([ends, cuts, ends + len(self._points)], axis=1)
        counts, sums = (np.diff(moment[edges], axis=1) for moment in self._sums[:2])
        errors: npt.NDArray[np.float64] = (
            self._sums[2][-1] - 2 * (grid * sums).sum(axis=1) + (grid * grid * counts).sum(axis=1)
        )
        return errors


_METHODS: Final[Mapping[str, Callable[[Extremes, Quantizer, Calibration], Range]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}
