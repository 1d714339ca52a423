"""rewriter/calibration/observers.py: exact extremes, and a histogram that batches cannot change."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rewriter.calibration.observers import BINS_PER_SIDE, Extremes, Histogram, NotFiniteError

FloatArray = npt.NDArray[np.float32]

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(1, 60), elements=finite)


def observed(*batches: FloatArray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


@given(values=arrays)
def test_extremes_are_those_of_all_values(values: FloatArray) -> None:
    extremes = Extremes()
    for value in values:
        extremes.update(value.reshape(1, 1))
    assert (extremes.low, extremes.high, extremes.count) == (values.min(), values.max(), values.size)


@given(values=arrays, cut=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_histogram_depends_neither_on_batches_nor_on_order(values: FloatArray, cut: int, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(values)
    whole, parts = observed(values), observed(shuffled[:cut], shuffled[cut:])
    assert whole.width == parts.width
    np.testing.assert_array_equal(whole.counts, parts.counts)


@given(values=arrays)
def test_every_value_lies_in_the_bin_that_counts_it(values: FloatArray) -> None:
    histogram = observed(values)
    exact = np.floor(values.astype(np.float64) / histogram.width).astype(np.int64) + BINS_PER_SIDE
    np.testing.assert_array_equal(histogram.counts, np.bincount(exact, minlength=2 * BINS_PER_SIDE))


@given(values=arrays)
def test_the_largest_magnitude_uses_half_of_its_side(values: FloatArray) -> None:
    largest = float(np.abs(values).max())
    if largest > 1e-20:
        width = observed(values).width
        assert BINS_PER_SIDE / 2 <= largest / width <= BINS_PER_SIDE


def test_a_large_outlier_after_small_values() -> None:
    histogram = observed(np.full(1000, 1e-30, np.float32), np.array([3e38, -1e-30, 0], np.float32))
    assert histogram.counts[BINS_PER_SIDE] == 1001
    assert histogram.counts[BINS_PER_SIDE - 1] == 1
    assert histogram.counts.sum() == 1003


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("observer", [Extremes, Histogram])
def test_values_that_are_not_finite_are_refused(observer: Any, bad: float) -> None:
    with pytest.raises(NotFiniteError):
        observer().update(np.array([0, bad, 1], np.float32))


def test_an_empty_tensor_changes_nothing() -> None:
    histogram = observed(np.array([1, 2], np.float32), np.zeros((0, 3), np.float32))
    assert (histogram.low, histogram.high, histogram.count, histogram.counts.sum()) == (1, 2, 2, 2)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.9, 0.999])
def test_quantiles_are_those_of_the_values_to_a_bin(share: float) -> None:
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    histogram = observed(values)
    for found, raw in (
        (histogram.quantile(share), values),
        (histogram.magnitude_quantile(share), np.abs(values)),
    ):
        # Between two neighbouring values, any value is the quantile.
        neighbours = np.quantile(raw, [share - 1 / raw.size, share + 1 / raw.size])
        assert neighbours[0] - histogram.width <= found <= neighbours[1] + histogram.width


@given(values=arrays, share=st.floats(0, 1))
def test_quantiles_stay_inside_the_values(values: FloatArray, share: float) -> None:
    histogram = observed(values)
    assert values.min() <= histogram.quantile(share) <= values.max()
    assert 0 <= histogram.magnitude_quantile(share) <= np.abs(values).max()
