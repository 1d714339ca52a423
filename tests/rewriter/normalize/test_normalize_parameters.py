"""Faulty parameters are named themselves, not the activations that they spoil."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.normalize import normalize
from tests.rewriter.graphs import graph

LAYER = (
    "g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w, float[4] b, float[4] gamma, float[4] beta, "
    "float[4] mean, float[4] variance> { "
    "c = Conv(x, w, b) y = BatchNormalization (c, gamma, beta, mean, variance) }"
)
ONES = np.ones(4, np.float32)


def normalized(text: str = LAYER, epsilon: float | None = None, **values: np.ndarray) -> None:
    if epsilon is not None:
        text = text.replace("BatchNormalization ", f"BatchNormalization<epsilon={epsilon}>")
    normalize(graph(text, **{"variance": ONES, **values}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w", "b", "gamma", "beta", "mean", "variance"])
def test_a_value_that_is_not_finite_is_named(name: str, value: float) -> None:
    values = np.ones((4, 3, 3, 3) if name == "w" else 4, np.float32)
    values.flat[2] = value
    with pytest.raises(QatError, match=f"Parameter '{name}' of [A-Za-z]+ holds NaN or infinity") as error:
        normalized(**{name: values})
    assert error.value.code == ErrorCode.MODEL_INVALID
    assert error.value.node == ("c_node" if name in "wb" else "y_node")


@pytest.mark.parametrize(("variance", "epsilon"), [(0, 0.0), (-1, None), (-0.5, 0.5), (-1e-5, None)])
def test_a_variance_that_has_no_root_is_named(variance: float, epsilon: float | None) -> None:
    values = np.array([1, variance, 1, 1], np.float32)
    with pytest.raises(QatError, match="The variance 'variance' of BatchNormalization is not") as error:
        normalized(epsilon=epsilon, variance=values)
    assert (error.value.code, error.value.node) == (ErrorCode.MODEL_INVALID, "y_node")


@pytest.mark.parametrize(("variance", "epsilon"), [(0, None), (-0.5, 1.0), (1, 0.0)])
def test_a_variance_that_epsilon_makes_positive_is_not(variance: float, epsilon: float | None) -> None:
    normalized(epsilon=epsilon, variance=np.full(4, variance, np.float32))


def test_parameters_of_different_lengths_are_named() -> None:
    text = LAYER.replace("float[4] mean", "float[3] mean")
    with pytest.raises(QatError, match="different lengths: 'gamma' 4, 'beta' 4, 'mean' 3") as error:
        normalized(text)
    assert (error.value.code, error.value.node) == (ErrorCode.MODEL_INVALID, "y_node")


@pytest.mark.parametrize("shape", ["[5,0]", "[0,5]"])
def test_a_weight_without_elements_is_named(shape: str) -> None:
    text = f"g (float[N,5] x) => (y) <float[5,5] v, float{shape} w> {{ c = MatMul(x, v) y = Gemm(c, w) }}"
    values = np.zeros([int(size) for size in shape[1:-1].split(",")], np.float32)
    with pytest.raises(QatError, match="Parameter 'w' of Gemm has no elements") as error:
        normalized(text, w=values)
    assert (error.value.code, error.value.node) == (ErrorCode.MODEL_INVALID, "y_node")


def test_infinity_that_is_no_parameter_is_accepted() -> None:
    text = "g (float[N,5] x) => (y) <float[5,5] v, float[5] mask> { c = MatMul(x, v) y = Min(c, mask) }"
    normalized(text, mask=np.full(5, np.inf, np.float32))
