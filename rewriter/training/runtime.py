"""Runs bundles with `onnxruntime.training.api`; the only module that imports `onnxruntime.training`.

That package imports PyTorch in its `__init__`, for parts of it that are not used here. Its `api` does not
need PyTorch: it is imported below a stand-in for the package, which is taken away afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any, Final

import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from rewriter import bundle as bundles
from rewriter.errors import ErrorCode, QatError
from rewriter.inference import reason, run_failed, session_options, training_options
from rewriter.installation import Device, training_build
from rewriter.training import layout
from rewriter.training.checkpoint import IDENTITY, identity_of, of_another_bundle, saving

_PACKAGE: Final = "onnxruntime.training"


@dataclasses.dataclass(frozen=True)
class TrainingSession:
    """A bundle loaded for training: the objects of `onnxruntime.training.api`."""

    module: Any
    optimizer: Any
    state: Any

    def save(self, path: pathlib.Path, *, optimizer_state: bool = False) -> None:
        """Write the checkpoint: the parameters, and the moments of the optimizer if asked for.

        Raises:
            QatError: `output_unwritable`.
        """
        with bundles.new_file(path) as temporary, saving(temporary):
            training_api().CheckpointState.save_checkpoint(self.state, temporary, optimizer_state)


@functools.cache
def training_api() -> types.ModuleType:
    """The module `onnxruntime.training.api`, imported without PyTorch.

    Raises:
        QatError: `training_runtime_missing`.
    """
    training_build()
    with without_pytorch():
        return importlib.import_module(f"{_PACKAGE}.api")


@contextlib.contextmanager
def without_pytorch() -> Iterator[None]:
    """In the block parts of `onnxruntime.training` are imported without what the package itself imports."""
    if _PACKAGE in sys.modules:
        yield
        return
    stand_in = types.ModuleType(_PACKAGE)
    stand_in.__path__ = [str(pathlib.Path(onnxruntime.__file__).parent / "training")]
    sys.modules[_PACKAGE] = stand_in
    try:
        yield
    finally:
        del sys.modules[_PACKAGE]


def open_session(
    bundle: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
    *,
    device: Device = "cpu",
    trial: bool = False,
) -> TrainingSession:
    """Load a bundle directory for training.

    Args:
        checkpoint: where to start from; None: the checkpoint that the bundle was prepared with.
        trial: whether only to see that it loads: without optimizing the graphs, which takes longest, and
            without a word in the log.

    Raises:
        QatError: `training_runtime_missing`, also when the installed build has no CUDA;
            `checkpoint_invalid`; `run_failed` when onnxruntime refuses a model of the bundle.
    """
    api = training_api()
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise QatError(
            ErrorCode.TRAINING_RUNTIME_MISSING,
            "The installed onnxruntime-training has no CUDA: install this package with its extra [cuda] in "
            "place of [cpu], or train on the CPU.",
            field="device",
        )
    options = session_options(optimize=False) if trial else training_options()
    # Evaluate the same arithmetic that is trained: no fusion of Q/DQ pairs into integer operators.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    path = checkpoint or bundle / bundles.CHECKPOINT
    training_model = bundle / bundles.TRAINING_MODEL
    try:
        state = api.CheckpointState.load_checkpoint(path)
        if IDENTITY in state.properties and state.properties[IDENTITY] != identity_of(training_model):
            raise of_another_bundle(path)
        _require_parameters_of(training_model, state, path)
    except (RuntimeError, UnicodeDecodeError) as error:  # a damaged one may load
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"onnxruntime-training cannot load the checkpoint: {reason(error)}",
            file=path.name,
        ) from error
    try:
        module = api.Module(training_model, state, bundle / bundles.EVAL_MODEL, device, options)
        optimizer = api.Optimizer(bundle / bundles.OPTIMIZER_MODEL, module)
    except RuntimeError as error:
        raise run_failed("onnxruntime-training cannot load the bundle", error, bundle) from error
    except IndexError as error:  # a moment that it looks for in vain
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"{path.name} holds the state of another optimizer than the bundle's.",
            file=path.name,
        ) from error
    return TrainingSession(module, optimizer, state)


def _require_parameters_of(training_model: pathlib.Path, state: Any, checkpoint: pathlib.Path) -> None:
    """onnxruntime takes a parameter that the checkpoint lacks for an input, and fails later or not at all."""
    try:
        inputs = onnx.load(training_model).graph.input
    except (OSError, DecodeError) as error:
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            f"{training_model.name} cannot be read: prepare the bundle again.",
            file=training_model.name,
        ) from error
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in inputs}
    trainable = {name.removesuffix(layout.BUFFER) for name in shapes if name.endswith(layout.BUFFER)}
    found = {name: list(parameter.data.shape) for name, parameter in state.parameters}
    wrong = [*(trainable - found.keys()), *(name for name in found if found[name] != shapes.get(name))]
    if wrong:
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"The checkpoint does not fit the bundle: parameter {min(wrong)!r} is in one of them only, "
            "or has another shape.",
            file=checkpoint.name,
        )
