"""Trained values go back into the QAT model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import bundle as bundles
from rewriter.errors import ErrorCode, QatError
from rewriter.manifest import Manifest
from rewriter.training.checkpoint import require_shape
from rewriter.training.scales import trained_scales


def apply_checkpoint(
    model: ir.Model, manifest: Manifest, parameters: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Replace the weights and scales of `model`, in place, by those of a checkpoint.

    Raises:
        QatError: `checkpoint_invalid` when a trained parameter is missing, has another shape, is not finite
            or makes a scale that is none; `bundle_invalid` when the manifest and the model do not fit.
    """
    scale_parameters = {
        entry.scale: entry.scale_parameter for entry in manifest.quantizers if entry.scale_parameter
    }
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name in set(manifest.training.trainable) - set(scale_parameters.values()):
        values[name] = require_shape(parameters, name, _initial(model, name).shape)
        _require_finite(values[name], name)
    initial = {scale: _initial(model, scale) for scale in scale_parameters}
    values.update(trained_scales(parameters, initial, scale_parameters))
    for name, value in values.items():
        model.graph.initializers[name].const_value = ir.tensor(value, name=name)


def _require_finite(value: npt.NDArray[np.float32], name: str) -> None:
    if not np.isfinite(value).all():
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"The trained parameter {name!r} is not finite: training diverged. Use a smaller learning "
            "rate or an earlier checkpoint.",
            field=name,
        )


def _initial(model: ir.Model, name: str) -> npt.NDArray[np.float32]:
    """What the bundle was prepared with."""
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            f"{bundles.QAT_MODEL} has no initializer {name!r}, which {bundles.MANIFEST} lists: prepare the "
            "bundle again.",
            file=bundles.QAT_MODEL,
        )
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array
