"""ONNX quantization-aware training: a float model in, a trainable bundle and an int8 model out.

manifest = prepare(Path("model.onnx"), Path("bundle"), calibration=Path("samples.npz"))
finetune(Path("bundle"), Path("train.npz"), epochs=3)       # or any loop over onnxruntime.training.api
report = finalize(Path("bundle"), Path("model.int8.onnx"))

Names are imported when they are first asked for: neither onnx nor onnxruntime is loaded before.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rewriter.bundle import read_manifest, write_zip
    from rewriter.errors import ErrorCode, QatError
    from rewriter.finalize import Agreement, FinalizeReport, finalize
    from rewriter.finetune import Evaluation, FinetuneReport, LogRecord, Phase, finetune
    from rewriter.manifest import Manifest
    from rewriter.prepare import prepare
    from rewriter.progress import Progress
    from rewriter.recipe import Calibration, GraphLoss, Override, Recipe
    from rewriter.training.runtime import training_api

__all__ = [
    "Agreement",
    "Calibration",
    "ErrorCode",
    "Evaluation",
    "FinalizeReport",
    "FinetuneReport",
    "GraphLoss",
    "LogRecord",
    "Manifest",
    "Override",
    "Phase",
    "Progress",
    "QatError",
    "Recipe",
    "finalize",
    "finetune",
    "prepare",
    "read_manifest",
    "training_api",
    "write_zip",
]

_MODULES: Final = {
    "Agreement": "finalize",
    "Calibration": "recipe",
    "ErrorCode": "errors",
    "Evaluation": "finetune",
    "FinalizeReport": "finalize",
    "FinetuneReport": "finetune",
    "GraphLoss": "recipe",
    "LogRecord": "finetune",
    "Manifest": "manifest",
    "Override": "recipe",
    "Phase": "finetune",
    "Progress": "progress",
    "QatError": "errors",
    "Recipe": "recipe",
    "finalize": "finalize",
    "finetune": "finetune",
    "prepare": "prepare",
    "read_manifest": "bundle",
    "training_api": "training.runtime",
    "write_zip": "bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "onnxruntime":
            raise
        from rewriter.installation import missing

        raise missing() from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """The import of a submodule sets an attribute of its package: here, functions win over modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MODULES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
