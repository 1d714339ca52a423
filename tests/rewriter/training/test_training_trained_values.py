"""A checkpoint goes back into the QAT model, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import rewriter
from rewriter import Manifest
from rewriter.errors import ErrorCode, QatError
from rewriter.load import load
from rewriter.training.checkpoint import read_checkpoint
from rewriter.training.trained_values import apply_trained_checkpoint
from tests.rewriter.training import nets

Parameters = dict[str, np.ndarray]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    ir.save(nets.mlp(), tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", x=nets.batch(16)[0])
    rewriter.prepare(tmp_path / "model.onnx", tmp_path / "bundle", calibration=tmp_path / "samples.npz")
    return tmp_path / "bundle"


@pytest.fixture
def model(bundle: Path) -> ir.Model:
    return load(bundle / "qat_model.onnx")


@pytest.fixture
def evaluation(bundle: Path) -> ir.Model:
    return load(bundle / "eval_model.onnx")


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return rewriter.read_manifest(bundle)


@pytest.fixture
def parameters(bundle: Path) -> Parameters:
    return read_checkpoint(bundle / "checkpoint")


def values(model: ir.Model) -> Parameters:
    return {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


def test_the_prepared_checkpoint_changes_nothing(
    model: ir.Model, evaluation: ir.Model, manifest: Manifest, parameters: Parameters
) -> None:
    before = values(model)
    apply_trained_checkpoint(model, evaluation, manifest, parameters)
    np.testing.assert_equal(values(model), before)


def test_weights_are_replaced_and_scales_multiplied(
    model: ir.Model, evaluation: ir.Model, manifest: Manifest, parameters: Parameters
) -> None:
    before = values(model)
    for value in parameters.values():
        value += np.float32(0.25)  # a parameter of a scale is the logarithm of what it is multiplied with
    apply_trained_checkpoint(model, evaluation, manifest, parameters)
    after = values(model)
    scales = {q.scale for q in manifest.quantizers}
    assert len(scales) == 4
    for name in scales:
        np.testing.assert_allclose(after[name], before[name] * np.exp(0.25), rtol=1e-6)
    for name in ("W1", "b1", "W2", "b2"):
        np.testing.assert_array_equal(after[name], parameters[name])
    # Its parameter is the share of the range's width that a zero point with two sides moves by.
    assert after.pop("x_zero_point") == before["x_zero_point"] + np.rint(0.25 * 255)
    for name in after.keys() - scales - {"W1", "b1", "W2", "b2"}:
        np.testing.assert_array_equal(after[name], before[name])


def missing(parameters: Parameters, name: str) -> None:
    del parameters[name]


def reshaped(parameters: Parameters, name: str) -> None:
    parameters[name] = np.zeros((*parameters[name].shape, 2), np.float32)


def not_finite(parameters: Parameters, name: str) -> None:
    parameters[name].ravel()[-1] = np.nan


@pytest.mark.parametrize("damage", [missing, reshaped, not_finite])
@pytest.mark.parametrize("kind", ["weight", "scale"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    model: ir.Model, evaluation: ir.Model, manifest: Manifest, parameters: Parameters, damage, kind: str
) -> None:
    scale = next(q.scale_parameter for q in manifest.quantizers if q.axis is not None)
    name = "W2" if kind == "weight" else scale
    before = values(model)
    damage(parameters, name)
    with pytest.raises(QatError) as caught:
        apply_trained_checkpoint(model, evaluation, manifest, parameters)
    assert (caught.value.code, caught.value.field) == (ErrorCode.CHECKPOINT_INVALID, name)
    np.testing.assert_equal(values(model), before)


def test_a_model_that_lacks_what_the_manifest_lists_is_a_damaged_bundle(
    model: ir.Model, evaluation: ir.Model, manifest: Manifest, parameters: Parameters
) -> None:
    assert model.graph.initializers.pop("W2_scale").name == "W2_scale"
    with pytest.raises(QatError) as caught:
        apply_trained_checkpoint(model, evaluation, manifest, parameters)
    assert (caught.value.code, caught.value.file) == (ErrorCode.BUNDLE_INVALID, "qat_model.onnx")
