"""Trained values go into the QAT model: what the checkpoint holds, and what the eval model makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import bundle as bundles
from rewriter.errors import ErrorCode, QatError
from rewriter.manifest import Manifest
from rewriter.training.checkpoint import require_shape
from rewriter.training.derived import derived_values, require_scales


def apply_checkpoint(
    model: ir.Model, evaluation: ir.Model, parameters: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Replace the weights, scales and zero points of `model`, in place, by those of a checkpoint.

    Args:
        model: qat_model.onnx; its initializers are constants, parameters in the checkpoint, or computed in
            the eval model, by name.
        evaluation: eval_model.onnx.

    Raises:
        QatError: `checkpoint_invalid` when a parameter is missing or has another shape.
    """
    _replace(model, _values(model, evaluation, parameters))


def apply_trained_checkpoint(
    model: ir.Model,
    evaluation: ir.Model,
    manifest: Manifest,
    parameters: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    """The same with a checkpoint that may be any: what it holds must be of use. If not, nothing changes.

    Raises:
        QatError: `checkpoint_invalid` when a trained parameter or a state is missing, has another shape, is
            not finite or makes a scale that is none; `bundle_invalid` when manifest and model do not fit.
    """
    require_finite(manifest, parameters)
    for entry in manifest.quantizers:
        for name in (entry.scale, entry.zero_point):
            if name not in model.graph.initializers:
                raise QatError(
                    ErrorCode.BUNDLE_INVALID,
                    f"Initializer {name!r} of {bundles.MANIFEST} is not in {bundles.QAT_MODEL}: prepare the "
                    "bundle again.",
                    file=bundles.QAT_MODEL,
                )
    values = _values(model, evaluation, parameters)
    sources = {entry.scale: entry.scale_parameter or entry.scale for entry in manifest.quantizers}
    require_scales(values, {name: source for name, source in sources.items() if name in values})
    _replace(model, values)


def require_finite(manifest: Manifest, parameters: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Raise `checkpoint_invalid` for a trained parameter, or a state, that is missing or not finite."""
    for name in (*manifest.training.trainable, *manifest.training.state):
        if name not in parameters:
            require_shape(parameters, name, ())
        if not np.isfinite(parameters[name]).all():
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The trained parameter {name!r} is not finite: training diverged. Use a smaller learning "
                "rate or an earlier checkpoint.",
                field=name,
            )


def _values(
    model: ir.Model, evaluation: ir.Model, parameters: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    """The initializers of the QAT model that a checkpoint says, by name."""
    initializers = model.graph.initializers
    inputs = {value.name for value in evaluation.graph.inputs}
    values = {
        name: require_shape(parameters, name, _array(initializer).shape)
        for name, initializer in initializers.items()
        if name in inputs
    }
    return values | derived_values(evaluation, parameters, initializers)


def _replace(model: ir.Model, values: Mapping[str, npt.NDArray[np.float32]]) -> None:
    for name, array in values.items():
        initializer = model.graph.initializers[name]
        old = _array(initializer)
        # A zero point is computed as float32.
        array = array.reshape(old.shape).astype(old.dtype, copy=False)
        initializer.const_value = ir.tensor(array, name=name)


def _array(value: ir.Value) -> npt.NDArray[np.float32]:
    assert value.const_value is not None
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array
