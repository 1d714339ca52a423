"""Checkpoints: the files that `onnxruntime.training.api.CheckpointState` loads and saves.

Only the native part of onnxruntime's training build is used here, not the Python package on top of it.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter import bundle as bundles
from rewriter.errors import ErrorCode, QatError
from rewriter.inference import reason
from rewriter.installation import training_build


def latest_checkpoint(bundle: pathlib.Path) -> pathlib.Path:
    """The trained checkpoint of a bundle where there is one, else the one it was prepared with."""
    trained = bundle / bundles.TRAINED_CHECKPOINT
    return trained if trained.is_file() else bundle / bundles.CHECKPOINT


def write_checkpoint(trainable: Iterable[ir.Value], frozen: Iterable[ir.Value], path: pathlib.Path) -> None:
    """Write initializers as a new checkpoint: trainable parameters and frozen ones.

    The same values give the same bytes.

    Raises:
        QatError: `training_runtime_missing`, `output_unwritable`.
        OSError: there is no room for it.
    """
    native = training_build()
    with saving(path):
        native.save_checkpoint(
            [_serialized(value) for value in trainable],
            [_serialized(value) for value in frozen],
            str(path),
            False,
        )


@contextlib.contextmanager
def saving(path: pathlib.Path) -> Iterator[None]:
    """Around the native code that writes a checkpoint: it says that it failed, and not why."""
    try:
        yield
    except RuntimeError as error:
        with path.open("ab") as file:
            file.write(bytes(_PROBE))  # as a rule fails too, with the system's reason
        raise QatError(
            ErrorCode.OUTPUT_UNWRITABLE, f"The checkpoint cannot be written: {reason(error)}", file=path.name
        ) from error


_PROBE: Final = 1 << 16


def identity_of(training_model: pathlib.Path) -> str:
    """What tells a bundle from others: in the checkpoint is all that its training model does not say."""
    return bundles.describe(training_model).sha256


def stamp(path: pathlib.Path, identity: str) -> None:
    """Write into a new checkpoint which bundle it is of: the API keeps that when it loads and saves it."""
    native = training_build()
    state = native.load_checkpoint(str(path))
    state.add_property(IDENTITY, identity)
    with saving(path):
        native.save_checkpoint(state, str(path), False)


# Name of the property.
IDENTITY: Final = "training_model_sha256"


def of_another_bundle(path: pathlib.Path) -> QatError:
    """The error to raise for a checkpoint that another bundle's training wrote."""
    return QatError(
        ErrorCode.CHECKPOINT_INVALID,
        f"{path.name} is a checkpoint of another bundle: its scales and weights mean nothing in this one.",
        file=path.name,
    )


def read_checkpoint(path: pathlib.Path, identity: str | None = None) -> dict[str, npt.NDArray[np.float32]]:
    """All parameters of a checkpoint, trainable and frozen, by name; copies.

    Args:
        identity: of the bundle that it must be of; a checkpoint that does not say is taken.

    Raises:
        QatError: `checkpoint_invalid`, `training_runtime_missing`.
    """
    native = training_build()
    if not path.is_file():
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"There is no checkpoint {path.name!r} at {path.parent}.",
            file=path.name,
        )
    try:
        state = native.load_checkpoint(str(path))
        found = state.get_property(IDENTITY) if state.has_property(IDENTITY) else identity
        parameters = {
            name: np.array(state.get_parameter(name).data.numpy()) for name in sorted(state.parameter_names())
        }
    except (RuntimeError, UnicodeDecodeError) as error:  # a damaged one may load
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"{path.name} is not a checkpoint of onnxruntime-training 1.19: {reason(error)}",
            file=path.name,
        ) from error
    if identity is not None and found != identity:
        raise of_another_bundle(path)
    return parameters


def require_shape(
    parameters: Mapping[str, npt.NDArray[np.float32]], name: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """A parameter of a checkpoint.

    Raises:
        QatError: `checkpoint_invalid` when it is missing or has another shape.
    """
    found = parameters.get(name)
    if found is None or found.shape != shape:
        has = "no" if found is None else f"with the shape {list(found.shape)} the"
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"The checkpoint belongs to another bundle: it has {has} parameter {name!r}, which has the "
            f"shape {list(shape)} in this one.",
            field=name,
        )
    return found


def _serialized(value: ir.Value) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    proto = onnx.TensorProto(
        name=value.name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value, raw_data=tensor.tobytes()
    )
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized
