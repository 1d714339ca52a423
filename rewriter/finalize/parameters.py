"""Trained values go back into the QAT model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.manifest import Manifest
from rewriter.training.scales import trained_scales


def apply_checkpoint(
    model: ir.Model, manifest: Manifest, parameters: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Replace the weights and scales of `model`, in place, by those of a checkpoint.

    Raises:
        QatError: `checkpoint_invalid` when a trained parameter is missing, has another shape, or is not
            finite.
    """
    initializers = model.graph.initializers
    scale_parameters = {
        entry.scale: entry.scale_parameter for entry in manifest.quantizers if entry.scale_parameter
    }
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name in manifest.training.trainable:
        if name not in parameters:
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The checkpoint has no parameter {name!r}: it belongs to another bundle.",
                field=name,
            )
        if not np.isfinite(parameters[name]).all():
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The trained parameter {name!r} is not finite: training diverged. Use a smaller learning "
                "rate or an earlier checkpoint.",
                field=name,
            )
        if name in initializers:
            values[name] = parameters[name]
    initial = {scale: _numpy(initializers, scale) for scale in scale_parameters}
    values.update(trained_scales(parameters, initial, scale_parameters))
    for name, value in values.items():
        known = initializers.get(name)
        if known is None or known.shape is None or tuple(known.shape) != value.shape:
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The parameter {name!r} has the shape {list(value.shape)} in the checkpoint and "
                f"{'none' if known is None else known.shape} in the bundle: it belongs to another bundle.",
                field=name,
            )
        known.const_value = ir.tensor(value, name=name)


def _numpy(initializers: Mapping[str, ir.Value], name: str) -> npt.NDArray[np.float32]:
    value = initializers.get(name)
    if value is None or value.const_value is None:
        raise QatError(
            ErrorCode.BUNDLE_INVALID, f"qat_model.onnx has no initializer {name!r}.", file="qat_model.onnx"
        )
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array
