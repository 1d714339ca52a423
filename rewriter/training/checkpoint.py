"""Checkpoints: the files that `onnxruntime.training.api.CheckpointState` loads and saves.

Only the native part of onnxruntime's training build is used here, not the Python package on top of it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter import bundle as bundles
from rewriter.errors import ErrorCode, QatError

# What fine-tuning writes beside the prepared checkpoint, which stays as the manifest describes it.
TRAINED_CHECKPOINT: Final = "trained_checkpoint"


def latest_checkpoint(bundle: pathlib.Path) -> pathlib.Path:
    """The trained checkpoint of a bundle where there is one, else the one it was prepared with."""
    trained = bundle / TRAINED_CHECKPOINT
    return trained if trained.is_file() else bundle / bundles.CHECKPOINT


def write_checkpoint(trainable: Iterable[ir.Value], frozen: Iterable[ir.Value], path: pathlib.Path) -> None:
    """Write initializers as a new checkpoint: trainable parameters and frozen ones.

    The same values give the same bytes.

    Raises:
        QatError: `training_runtime_missing`.
    """
    native_module().save_checkpoint(
        [_serialized(value) for value in trainable],
        [_serialized(value) for value in frozen],
        str(path),
        False,
    )


def read_checkpoint(path: pathlib.Path) -> dict[str, npt.NDArray[np.float32]]:
    """All parameters of a checkpoint, trainable and frozen, by name; copies.

    Raises:
        QatError: `checkpoint_invalid`, `training_runtime_missing`.
    """
    native = native_module()
    if not path.is_file():
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"There is no checkpoint {path.name!r} at {path.parent}.",
            file=path.name,
        )
    try:
        state = native.load_checkpoint(str(path))
    except RuntimeError as error:
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"{path.name} is not a checkpoint of onnxruntime-training 1.19: {_first_line(error)}.",
            file=path.name,
        ) from error
    return {
        name: np.array(state.get_parameter(name).data.numpy()) for name in sorted(state.parameter_names())
    }


def native_module() -> Any:
    """The native module of onnxruntime's training build.

    Raises:
        QatError: `training_runtime_missing`.
    """
    try:
        from onnxruntime.capi import _pybind_state as native
    except ImportError as error:
        raise _missing() from error
    if not hasattr(native, "save_checkpoint"):
        raise _missing()
    return native


def _missing() -> QatError:
    return QatError(
        ErrorCode.TRAINING_RUNTIME_MISSING,
        "onnxruntime's training build is not installed: install this package with its extra [cpu] or [cuda], "
        "in an environment without onnxruntime or onnxruntime-gpu, which occupy the same folder.",
    )


def _serialized(value: ir.Value) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    proto = onnx.TensorProto(
        name=value.name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value, raw_data=tensor.tobytes()
    )
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["unknown error"])[0].rstrip(".")
