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
    if not {*scale_parameters.values()} <= {*manifest.training.trainable}:
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            "A trained scale is not listed as trainable: prepare the bundle again.",
            file=bundles.MANIFEST,
        )
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name in set(manifest.training.trainable) - set(scale_parameters.values()):
        values[name] = require_shape(parameters, name, _initial(model, name).shape)
        _require_finite(values[name], name)
    initial = {scale: _initial(model, scale) for scale in scale_parameters}
    for entry in manifest.quantizers:
        if not np.array_equal(
            _initial(model, entry.scale).ravel(), np.array(entry.initial_scale, np.float32)
        ):
            raise _do_not_fit(entry.scale, "is another in")
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
        raise _do_not_fit(name, "is not in")
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array


def _do_not_fit(name: str, how: str) -> QatError:
    return QatError(
        ErrorCode.BUNDLE_INVALID,
        f"Initializer {name!r} of {bundles.MANIFEST} {how} {bundles.QAT_MODEL}: prepare the bundle again.",
        file=bundles.QAT_MODEL,
    )
