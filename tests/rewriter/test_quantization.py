"""Quantizer arithmetic against the formulas evaluated one element at a time in Python's exact floats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.quantization import IntegerRange, dequantize, parameters_from_range, quantize


@pytest.mark.parametrize(("bits", "qmin", "qmax"), [(2, -1, 1), (4, -7, 7), (8, -127, 127)])
def test_weights_are_signed_and_narrow(bits, qmin, qmax):
    assert IntegerRange.for_weights(bits) == IntegerRange(qmin, qmax)
    assert IntegerRange.for_weights(bits).dtype == np.int8


@pytest.mark.parametrize(
    ("bits", "symmetric", "qmin", "qmax", "dtype"),
    [
        (8, False, 0, 255, np.uint8),
        (8, True, -128, 127, np.int8),
        (4, False, 0, 15, np.uint8),
        (4, True, -8, 7, np.int8),
        (2, False, 0, 3, np.uint8),
    ],
)
def test_activations_use_all_codes(bits, symmetric, qmin, qmax, dtype):
    range_ = IntegerRange.for_activations(bits, symmetric=symmetric)
    assert range_ == IntegerRange(qmin, qmax)
    assert range_.dtype == dtype


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    scale=st.floats(0.015625, 4, width=32),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    data=st.data(),
)
def test_quantize_rounds_half_to_even_and_saturates(values, scale, bits, symmetric, data):
    range_ = IntegerRange.for_activations(bits, symmetric=symmetric)
    zero_point = 0 if symmetric else data.draw(st.integers(range_.qmin, range_.qmax))
    q = quantize(np.array(values), np.array(scale), np.array(zero_point, range_.dtype), range_)
    expected = [min(max(round(v / scale) + zero_point, range_.qmin), range_.qmax) for v in values]
    assert q.tolist() == expected
    y = dequantize(q, np.array(scale), np.array(zero_point, range_.dtype))
    assert y.tolist() == [(code - zero_point) * scale for code in expected]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_scales_lie_along_the_axis(axis):
    x = np.random.default_rng(0).standard_normal((3, 4, 5))
    scale = np.linspace(0.01, 0.1, x.shape[axis])
    zero_point = np.zeros(x.shape[axis], np.int8)
    range_ = IntegerRange.for_weights(4)
    q = quantize(x, scale, zero_point, range_, axis)
    for channel in range(x.shape[axis]):
        alone = quantize(x.take(channel, axis), scale[channel], zero_point[channel], range_)
        np.testing.assert_array_equal(q.take(channel, axis), alone)


@given(
    low=st.floats(-1e4, 1e4),
    width=st.floats(0, 1e4),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_a_range_is_covered_and_zero_is_exact(low, width, bits, symmetric):
    range_ = IntegerRange.for_activations(bits, symmetric=symmetric)
    scale, zero_point = parameters_from_range(low, low + width, range_, symmetric=symmetric)
    assert scale > 0
    assert dequantize(zero_point, scale, zero_point) == 0
    step = float(scale)
    grid_low = (range_.qmin - int(zero_point)) * step
    grid_high = (range_.qmax - int(zero_point)) * step
    # The zero point is an integer, so either end may lie half a step inside the range.
    assert grid_low <= min(low, 0) + step * 0.5001
    assert grid_high >= max(low + width, 0) - step * 0.5001
