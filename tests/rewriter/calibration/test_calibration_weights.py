"""rewriter/calibration/weights.py: scales of weights from their values, against NumPy in float64."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from rewriter.calibration import weights as module
from rewriter.calibration.weights import weight_parameters
from rewriter.quantization import (
    MINIMUM_SCALE,
    IntegerRange,
    QuantizedTensor,
    Quantizer,
    dequantize,
    parameters_from_range,
    quantize,
)


def quantizer(bits: int = 8, axis: int | None = 0, *, symmetric: bool = True) -> Quantizer:
    tensors = (QuantizedTensor("w", ("n",)),)
    range_ = IntegerRange.for_weights(bits, symmetric=symmetric)
    return Quantizer("w", "weight", bits, range_, symmetric, axis, tensors)


def weight(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    channels = 10.0 ** generator.uniform(-4, 1, (shape[0], *[1] * (len(shape) - 1)))
    return (generator.standard_normal(shape) * channels).astype(np.float32)


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 3, 3), 0), ((5, 7, 2), 1), ((6, 9), -1), ((6, 9), None)])
def test_8_bits_take_the_largest_magnitude_of_each_channel(shape: tuple[int, ...], axis: int | None) -> None:
    w = weight(*shape)
    parameters = weight_parameters([w], quantizer(8, axis))
    others = None if axis is None else tuple(d for d in range(w.ndim) if d != axis % w.ndim)
    np.testing.assert_allclose(parameters.scale, np.abs(w).max(axis=others) / 127, rtol=1e-6)
    assert parameters.scale.dtype == np.float32
    assert parameters.scale.shape == (() if axis is None else (shape[axis],))
    assert parameters.zero_point.dtype == np.int8
    assert parameters.zero_point.shape == parameters.scale.shape
    assert not parameters.zero_point.any()
    assert parameters.initialized == "values"


@pytest.mark.parametrize("axis", [0, None])
def test_asymmetric_8_bits_take_the_range_of_each_channel(axis: int | None) -> None:
    w = weight(6, 3, 3) + np.linspace(-3, 3, 6, dtype=np.float32)[:, None, None]
    parameters = weight_parameters([w], quantizer(8, axis, symmetric=False))
    others = None if axis is None else (1, 2)
    low, high = np.minimum(w.min(axis=others), 0), np.maximum(w.max(axis=others), 0)
    np.testing.assert_allclose(parameters.scale, (high - low) / 254, rtol=1e-6)
    np.testing.assert_array_equal(parameters.zero_point, np.clip(np.rint(1 - low / parameters.scale), 1, 255))
    assert parameters.zero_point.dtype == np.uint8
    assert parameters.zero_point.shape == parameters.scale.shape == (() if axis is None else (6,))


def _error(
    w: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float64],
    q: Quantizer,
    zero_point: npt.NDArray[np.integer] | None = None,
) -> npt.NDArray[np.float64]:
    if zero_point is None:
        zero_point = np.zeros(scale.shape, np.int8)
    x = w.astype(np.float64)
    squared = (
        dequantize(quantize(x, scale, zero_point, q.range, q.axis), scale, zero_point, q.axis) - x
    ) ** 2
    others = None if q.axis is None else tuple(d for d in range(w.ndim) if d != q.axis)
    return np.asarray(squared.mean(axis=others))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize(("shape", "axis"), [((12, 16, 3, 3), 0), ((150, 16), 1), ((40, 11), None)])
def test_fewer_bits_take_nearly_the_best_scale_of_a_fine_search(
    bits: int, shape: tuple[int, ...], axis: int | None
) -> None:
    w = weight(*shape) if axis == 0 else np.random.default_rng(1).laplace(size=shape).astype(np.float32)
    q = quantizer(bits, axis)
    scale = weight_parameters([w], q).scale
    others = None if axis is None else tuple(d for d in range(w.ndim) if d != axis)
    full = np.abs(w.astype(np.float64)).max(axis=others) / q.range.qmax
    best = np.min([_error(w, np.asarray(full * a), q) for a in np.linspace(1, 0.1, 400)], axis=0)
    found = _error(w, scale.astype(np.float64), q)
    assert (found <= _error(w, full, q) * (1 + 1e-6)).all()
    assert np.all(found <= best * 1.1)
    assert np.mean(found / best) <= 1.03


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [0, None])
def test_fewer_asymmetric_bits_do_better_than_the_whole_range(bits: int, axis: int | None) -> None:
    w = np.random.default_rng(1).gumbel(size=(6, 200)).astype(np.float32)
    q = quantizer(bits, axis, symmetric=False)
    found = weight_parameters([w], q)
    whole = parameters_from_range(
        w.min(axis=None if axis is None else 1), w.max(axis=None if axis is None else 1), q.range,
        symmetric=False,
    )  # fmt: skip
    errors = [
        _error(w, scale.astype(np.float64), q, zero_point)
        for scale, zero_point in ((found.scale, found.zero_point), whole)
    ]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].mean() < 0.95 * errors[1].mean()


def test_an_asymmetric_channel_of_zeros_has_room_to_both_sides() -> None:
    w = np.stack([np.zeros(9), np.linspace(-1, 2, 9)]).astype(np.float32)
    parameters = weight_parameters([w], quantizer(8, symmetric=False))
    assert parameters.scale[0] == parameters.scale[1]
    np.testing.assert_array_equal(parameters.zero_point, [128, 86])


@pytest.mark.parametrize("axis", [0, None])
def test_the_search_does_not_depend_on_how_the_weight_is_cut(
    axis: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight(6, 4, 5)
    whole = weight_parameters([w], quantizer(4, axis)).scale
    monkeypatch.setattr(module, "_BLOCK", 7)
    np.testing.assert_array_equal(weight_parameters([w], quantizer(4, axis)).scale, whole)


def test_tensors_that_share_a_quantizer_are_searched_together() -> None:
    one, two = weight(6, 10, seed=1), weight(6, 20, seed=2)
    for bits in (4, 8):
        shared = weight_parameters([one, two], quantizer(bits)).scale
        joined = weight_parameters([np.concatenate([one, two], axis=1)], quantizer(bits)).scale
        np.testing.assert_allclose(shared, joined, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_channel_of_zeros_gets_the_scale_of_its_neighbours(bits: int) -> None:
    w = np.stack([np.zeros(9), np.full(9, 0.5), np.full(9, 1.0), np.full(9, 2.0)]).astype(np.float32)
    scale = weight_parameters([w], quantizer(bits)).scale
    assert scale[0] == np.median(scale[1:])


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_weight_of_zeros_covers_one(bits: int, axis: int | None) -> None:
    q = quantizer(bits, axis)
    scale = weight_parameters([np.zeros((3, 4), np.float32)], q).scale
    np.testing.assert_allclose(scale, 1 / q.range.qmax)


def test_denormal_weights_keep_the_scale_usable() -> None:
    for bits in (2, 8):
        scale = weight_parameters([np.full((2, 3), 1e-42, np.float32)], quantizer(bits)).scale
        np.testing.assert_allclose(scale, MINIMUM_SCALE)


def test_the_search_takes_little_memory_beside_the_weight() -> None:
    w = np.random.default_rng(0).standard_normal((64, 100_000)).astype(np.float32)  # 26 MB
    for axis in (0, None):
        tracemalloc.start()
        weight_parameters([w], quantizer(2, axis))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6
