"""Trained scales: s = s0 exp(p), and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.training.scales import parameterize, trained_scales
from tests.rewriter.training import nets


def test_scales_are_those_of_the_formula() -> None:
    initial = {"a": np.array([0.5, 2.0], np.float32), "b": np.array(0.1, np.float32)}
    parameters = {"p": np.array([0.0, np.log(2)], np.float32), "q": np.array(-1, np.float32)}
    scales = trained_scales(parameters, initial, {"a": "p", "b": "q"})
    np.testing.assert_allclose(scales["a"], [0.5, 4.0], rtol=1e-6)
    np.testing.assert_allclose(scales["b"], 0.1 / np.e, rtol=1e-6)
    assert {(s.dtype.name, s.shape) for s in scales.values()} == {("float32", (2,)), ("float32", ())}


def test_without_trained_scales_there_are_none() -> None:
    assert trained_scales({}, {"a": np.array(1, np.float32)}, {}) == {}


@pytest.mark.parametrize("value", [100, -200, -86, np.inf, -np.inf, np.nan])
def test_a_scale_of_0_or_infinity_means_that_training_diverged(value: float) -> None:
    parameters = {"p": np.array([0, value], np.float32)}
    with pytest.raises(QatError, match="diverged") as caught:
        trained_scales(parameters, {"s": np.float32([0.1, 0.1])}, {"s": "p"})
    assert (caught.value.code, caught.value.field) == (ErrorCode.CHECKPOINT_INVALID, "p")


@pytest.mark.parametrize("shape", [None, (), (3,), (1, 2)])
def test_a_parameter_of_another_shape_is_of_another_bundle(shape: tuple[int, ...] | None) -> None:
    parameters = {} if shape is None else {"p": np.zeros(shape, np.float32)}
    with pytest.raises(QatError, match="another bundle") as caught:
        trained_scales(parameters, {"s": np.float32([0.1, 0.1])}, {"s": "p"})
    assert (caught.value.code, caught.value.field) == (ErrorCode.CHECKPOINT_INVALID, "p")


def test_a_parameterized_scale_keeps_its_name_and_starts_at_its_value() -> None:
    net = nets.quantized_mlp()
    scale = net.graph.initializers["W1_scale"]
    value = scale.const_value.numpy()
    readers = {use.node.name for use in scale.uses()}
    (trained,) = parameterize(net.graph, [scale])
    assert "W1_scale" not in net.graph.initializers
    assert trained.scale.name == "W1_scale"
    assert {use.node.name for use in trained.scale.uses()} == readers
    np.testing.assert_array_equal(trained.initial.const_value.numpy(), value)
    np.testing.assert_array_equal(trained.parameter.const_value.numpy(), np.zeros_like(value))
