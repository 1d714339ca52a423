"""Learned ranges: s = s0 exp(p), z = clip(round(z0 + width o)), and what is none.

Their gradients are compared with LSQ's and LSQ+'s formulas in test_training_artifacts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.quantization import IntegerRange
from rewriter.recipe import Recipe
from rewriter.training.artifacts import TrainingReport, write_training_artifacts
from rewriter.training.checkpoint import read_checkpoint
from rewriter.training.derived import derived_values, require_scales
from tests.rewriter.training import nets

BITS = 4
X_ZERO_POINT = 2 ** (BITS - 1)
X_SCALE = np.float32(5.0 / (2**BITS - 1))


@pytest.fixture
def artifacts(tmp_path: Path) -> tuple[TrainingReport, ir.Model, dict[str, np.ndarray]]:
    """Of `nets.quantized_mlp`: the report, the eval model and what the checkpoint holds."""
    report = write_training_artifacts(nets.quantized_mlp(BITS), Recipe(), tmp_path)
    evaluation = ir.from_proto(onnx.load(tmp_path / "eval_model.onnx"))
    return report, evaluation, read_checkpoint(tmp_path / "checkpoint")


def test_a_range_starts_as_calibrated(artifacts: tuple) -> None:
    _, evaluation, parameters = artifacts
    values = derived_values(evaluation, parameters, ["x_scale", "x_zero_point", "W1_scale"])
    net = nets.quantized_mlp(BITS)
    np.testing.assert_array_equal(values["x_scale"], X_SCALE)
    np.testing.assert_array_equal(values["x_zero_point"], X_ZERO_POINT)
    np.testing.assert_array_equal(values["W1_scale"], net.graph.initializers["W1_scale"].const_value.numpy())


def test_ranges_are_those_of_the_formula(artifacts: tuple) -> None:
    report, evaluation, parameters = artifacts
    parameters[report.scale_parameters["x_scale"]] = np.array(np.log(2), np.float32)
    for offset, expected in ((0.1, 10), (-0.1, 6), (0.09, 9), (9, 15), (-9, 0)):
        parameters[report.zero_point_parameters["x_zero_point"]] = np.array(offset, np.float32)
        values = derived_values(evaluation, parameters, ["x_scale", "x_zero_point"])
        np.testing.assert_allclose(values["x_scale"], 2 * X_SCALE, rtol=1e-6)
        assert values["x_zero_point"] == expected


def test_zero_points_are_trained_where_the_range_has_two_sides(artifacts: tuple) -> None:
    """Not behind a Relu, whose range begins at 0, and not of weights, which are symmetric."""
    report, _, parameters = artifacts
    assert report.zero_point_parameters == {"x_zero_point": "x_zero_point.offset"}
    assert report.scale_parameters.keys() == {"x_scale", "r_scale", "W1_scale", "W2_scale"}
    assert {"x_zero_point.offset", "x_scale.log_multiplier"} < set(report.trainable)
    assert parameters["x_zero_point.offset"] == 0


def test_symmetric_ranges_keep_zero_point_0(tmp_path: Path) -> None:
    net = nets.mlp()
    for name, scale in (("x", 0.1), ("W1", 0.1)):
        nets.quantize(net, name, IntegerRange.for_activations(8, symmetric=True), np.float32(scale), 0)
    report = write_training_artifacts(net, Recipe(symmetric=True), tmp_path)
    assert report.zero_point_parameters == {}


@pytest.mark.parametrize("value", [100, -200, -86, np.inf, -np.inf, np.nan])
def test_a_scale_of_0_or_infinity_means_that_training_diverged(artifacts: tuple, value: float) -> None:
    report, evaluation, parameters = artifacts
    name = report.scale_parameters["W1_scale"]
    parameters[name] = parameters[name].copy()
    parameters[name][1] = value
    values = derived_values(evaluation, parameters, ["W1_scale"])
    with pytest.raises(QatError, match="diverged") as caught:
        require_scales(values, {"W1_scale": name})
    assert (caught.value.code, caught.value.field) == (ErrorCode.CHECKPOINT_INVALID, name)


@pytest.mark.parametrize("shape", [None, (), (3,), (1, 8)])
def test_a_parameter_of_another_shape_is_of_another_bundle(
    artifacts: tuple, shape: tuple[int, ...] | None
) -> None:
    report, evaluation, parameters = artifacts
    name = report.scale_parameters["W1_scale"]
    if shape is None:
        del parameters[name]
    else:
        parameters[name] = np.zeros(shape, np.float32)
    with pytest.raises(QatError, match="another bundle") as caught:
        derived_values(evaluation, parameters, ["W1_scale"])
    assert (caught.value.code, caught.value.field) == (ErrorCode.CHECKPOINT_INVALID, name)


def test_frozen_covers_zero_points(tmp_path: Path) -> None:
    report = write_training_artifacts(nets.quantized_mlp(BITS), Recipe(frozen=("x_zero_point",)), tmp_path)
    assert report.zero_point_parameters == {}
    assert report.frozen["x_zero_point"] == "frozen by the recipe ('x_zero_point')"
    assert "x_scale" in report.scale_parameters
