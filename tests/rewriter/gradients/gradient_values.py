"""Values for the inputs of gradient cases."""

from __future__ import annotations

import numpy as np

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape), np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.asarray(RNG.random(shape) + 0.5, np.float32)


def spread(*shape: int) -> np.ndarray:
    """Values 0.1 apart, half of them negative, none within 0.04 of 0: no step of the check crosses a tie."""
    count = int(np.prod(shape))
    return ((RNG.permutation(count).reshape(shape) - count // 2) * 0.1 + 0.05).astype(np.float32)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def scalar(number: float) -> np.ndarray:
    return np.array(number, np.float32)
