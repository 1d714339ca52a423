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
    initializers = model.graph.initializers
    inputs = {value.name for value in evaluation.graph.inputs}
    values = derived_values(evaluation, parameters, initializers)
    for name, initializer in initializers.items():
        if name in values:
            array = values[name].reshape(_array(initializer).shape)
        elif name in inputs:
            array = require_shape(parameters, name, _array(initializer).shape)
        else:
            continue
        dtype = _array(initializer).dtype  # a zero point is computed as float32
        initializer.const_value = ir.tensor(array.astype(dtype, copy=False), name=name)


def require_usable(manifest: Manifest, parameters: Mapping[str, npt.NDArray[np.float32]]) -> None:
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


def require_usable_scales(manifest: Manifest, model: ir.Model) -> None:
    """Raise `checkpoint_invalid` for a scale that training made unusable, `bundle_invalid` for one that is
    not in the model."""
    scales, sources = {}, {}
    for entry in manifest.quantizers:
        value = model.graph.initializers.get(entry.scale)
        if value is None or value.const_value is None:
            raise QatError(
                ErrorCode.BUNDLE_INVALID,
                f"Initializer {entry.scale!r} of {bundles.MANIFEST} is not in {bundles.QAT_MODEL}: "
                "prepare the bundle again.",
                file=bundles.QAT_MODEL,
            )
        scales[entry.scale] = _array(value)
        sources[entry.scale] = entry.scale_parameter or entry.scale
    require_scales(scales, sources)


def _array(value: ir.Value) -> npt.NDArray[np.float32]:
    assert value.const_value is not None
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array
