"""rewriter/calibration/ranges.py: minmax, percentile and the least squared error, against the raw values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rewriter.calibration.observers import Histogram
from rewriter.calibration.ranges import choose_range
from rewriter.quantization import (
    IntegerRange,
    QuantizedTensor,
    Quantizer,
    dequantize,
    parameters_from_range,
    quantize,
)
from rewriter.recipe import Calibration

FloatArray = npt.NDArray[np.float32]


def quantizer(bits: int, symmetric: bool) -> Quantizer:
    range_ = IntegerRange.for_activations(bits, symmetric=symmetric)
    tensors = (QuantizedTensor("x", ("n",)),)
    return Quantizer("x", "activation", bits, range_, symmetric, None, tensors)


def chosen(
    values: FloatArray, method: str, bits: int = 8, symmetric: bool = False, percentile: float = 99.99
) -> tuple[float, float]:
    histogram = Histogram()
    histogram.update(values)
    settings = Calibration.model_validate({"method": method, "percentile": percentile})
    return choose_range(histogram, quantizer(bits, symmetric), settings)


def squared_error(values: FloatArray, low: float, high: float, q: Quantizer) -> float:
    scale, zero_point = parameters_from_range(low, high, q.range, symmetric=q.symmetric)
    s, z = np.asarray(scale, np.float64), np.asarray(zero_point)
    x = values.astype(np.float64)
    return float(np.mean((dequantize(quantize(x, s, z, q.range), s, z) - x) ** 2))


DISTRIBUTIONS = {
    "normal": lambda g: g.normal(0.3, 1, 20_000),
    "laplace": lambda g: g.laplace(size=20_000),
    "after relu": lambda g: np.maximum(g.normal(size=20_000), 0),
    "hard swish": lambda g: (lambda x: x * np.clip(x / 6 + 0.5, 0, 1))(g.normal(0, 2, 20_000)),
    "negative": lambda g: -g.exponential(size=20_000),
    "far from zero": lambda g: g.normal(50, 1, 20_000),
    "one outlier": lambda g: np.append(g.normal(size=20_000), 300.0),
    "two clusters": lambda g: np.concatenate([g.normal(-7, 0.1, 9_000), g.normal(1, 0.1, 11_000)]),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_as_good_as_brute_force_over_the_raw_values(
    distribution: str, bits: int, symmetric: bool
) -> None:
    values = DISTRIBUTIONS[distribution](np.random.default_rng(0)).astype(np.float32)
    q = quantizer(bits, symmetric)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    shrink = np.linspace(1, 0.03, 30 if low < 0 < high and not symmetric else 300)
    pairs = [(a, b) for a in shrink for b in shrink] if len(shrink) == 30 else [(a, a) for a in shrink]
    best = min(squared_error(values, low * a, high * b, q) for a, b in pairs)
    found = squared_error(values, *chosen(values, "mse", bits, symmetric), q)
    assert found <= best * 1.01
    assert found <= squared_error(values, low, high, q)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_16_bits_keep_more_than_8(distribution: str, symmetric: bool, method: str) -> None:
    values = DISTRIBUTIONS[distribution](np.random.default_rng(0)).astype(np.float32)
    ranges = [chosen(values, method, bits, symmetric, percentile=100.0) for bits in (8, 16)]
    scale, zero_point = parameters_from_range(*ranges[1], quantizer(16, symmetric).range, symmetric=symmetric)
    assert zero_point.dtype == (np.int16 if symmetric else np.uint16)
    assert scale >= (values.max() - min(values.min(), 0)) / 2**16 * (1 - 1e-6)
    errors = [
        squared_error(values, *range_, quantizer(bits, symmetric))
        for bits, range_ in zip((8, 16), ranges, strict=True)
    ]
    assert errors[1] < errors[0] / 4**7  # the full gain is 4^8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_zero_after_a_relu_is_qmin_exactly(method: str, bits: int) -> None:
    values = np.maximum(np.random.default_rng(0).normal(size=10_000), 0).astype(np.float32)
    scale, zero_point = parameters_from_range(
        *chosen(values, method, bits), quantizer(bits, False).range, symmetric=False
    )
    assert zero_point == 0
    assert scale > 0


def test_minmax_is_the_extremes() -> None:
    values = np.array([-3, 0.5, 7], np.float32)
    assert chosen(values, "minmax") == (-3, 7)


class TestPercentile:
    values = np.random.default_rng(0).normal(size=500_000).astype(np.float32)

    @pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
    def test_asymmetric_keeps_the_share_with_equal_tails(self, percentile: float) -> None:
        low, high = chosen(self.values, "percentile", percentile=percentile)
        tail = (1 - percentile / 100) / 2
        assert np.mean(self.values < low) == pytest.approx(tail, rel=0.03)
        assert np.mean(self.values > high) == pytest.approx(tail, rel=0.03)

    @pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
    def test_symmetric_keeps_the_share_of_the_magnitudes(self, percentile: float) -> None:
        low, high = chosen(self.values, "percentile", symmetric=True, percentile=percentile)
        assert low == -high
        assert np.mean(np.abs(self.values) <= high) == pytest.approx(percentile / 100, abs=1e-4)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_values_of_one_sign_are_cut_on_their_side_alone(self, sign: int) -> None:
        values = sign * np.abs(self.values)
        bounds = chosen(values, "percentile", percentile=99.0)
        assert 0.0 in bounds
        kept = (values >= bounds[0]) & (values <= bounds[1])
        assert kept.mean() == pytest.approx(0.99, abs=1e-3)

    def test_all_of_the_values(self) -> None:
        assert chosen(self.values, "percentile", percentile=100.0) == pytest.approx(
            (self.values.min(), self.values.max()), rel=1e-6
        )


@given(
    values=hnp.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    bits=st.sampled_from([2, 3, 8]),
    symmetric=st.booleans(),
    method=st.sampled_from(["minmax", "percentile", "mse"]),
)
def test_any_values_have_a_range_inside_their_own(
    values: FloatArray, bits: int, symmetric: bool, method: str
) -> None:
    low, high = chosen(values, method, bits, symmetric)
    assert np.isfinite([low, high]).all()
    assert low <= high
    if symmetric:
        assert max(-low, high) <= np.abs(values).max()
    else:
        assert min(values.min(), 0) <= low
        assert high <= max(values.max(), 0)
