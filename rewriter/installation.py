"""Which onnxruntime is installed: its training build comes as an extra of this package, [cpu] or [cuda].

Nothing is imported here that needs it, so that its absence can be said.
"""

from __future__ import annotations

from typing import Any, Literal

from rewriter.errors import ErrorCode, QatError

Device = Literal["cpu", "cuda"]


def training_build() -> Any:
    """The native module of onnxruntime's training build.

    Raises:
        QatError: `training_runtime_missing`.
    """
    try:
        from onnxruntime.capi import _pybind_state as native
    except ImportError as error:
        raise missing() from error
    if not hasattr(native, "save_checkpoint"):
        raise missing()
    return native


def missing() -> QatError:
    """The error to raise where it is not installed."""
    return QatError(
        ErrorCode.TRAINING_RUNTIME_MISSING,
        "onnxruntime's training build is not installed: install this package with its extra [cpu] or [cuda], "
        "in an environment without onnxruntime or onnxruntime-gpu, which occupy the same folder.",
    )
