"""`onnxruntime.training.api` where there is no PyTorch.

The package `onnxruntime.training` imports PyTorch, its module `api` does not use it: an empty stand-in for
the package, with its search path, lets the module be imported alone.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import onnxruntime

_package = types.ModuleType("onnxruntime.training")
_package.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
sys.modules.setdefault("onnxruntime.training", _package)

from onnxruntime.training.api import CheckpointState, Module, Optimizer  # noqa: E402

__all__ = ["CheckpointState", "Module", "Optimizer"]
