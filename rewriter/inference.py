"""Plain onnxruntime sessions on the CPU: quiet, and with errors that a person can read."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy.typing as npt
import onnxruntime

from rewriter.errors import ErrorCode, QatError

_LONGEST_REASON: Final = 400
_ERRORS_ONLY: Final = 3
_NOTHING: Final = 4


def session_options(*, optimize: bool = True) -> onnxruntime.SessionOptions:
    """Options of a session that prints nothing: its errors arrive as exceptions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _NOTHING
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def training_options() -> onnxruntime.SessionOptions:
    """Options of a training session, whose native code also reports errors in its log alone."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    return options


def open_session(
    model: pathlib.Path | bytes, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Raises:
        QatError: `run_failed`, onnxruntime does not take the model.
    """
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(
            source, options or session_options(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises several classes that have only this one in common
        folder = None if isinstance(model, bytes) else model.parent
        raise run_failed("onnxruntime does not take the model", error, folder) from error


def run(
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str],
    feed: Mapping[str, npt.NDArray[Any]],
    samples: str = "the samples",
) -> list[npt.NDArray[Any]]:
    """The outputs, in the order asked for.

    Args:
        samples: which samples the feed holds, for the error message.

    Raises:
        QatError: `run_failed`, naming the node if onnxruntime does.
    """
    try:
        results: list[npt.NDArray[Any]] = session.run(list(outputs), dict(feed))
    except Exception as error:  # see open_session
        raise run_failed(f"onnxruntime could not run the model on {samples}", error) from error
    return results


def run_failed(what: str, error: Exception, folder: pathlib.Path | None = None) -> QatError:
    """The `run_failed` error of an onnxruntime exception: its reason, and its node as a field.

    Args:
        folder: where the model lies, often a temporary directory: left out of the message.
    """
    text = " ".join(str(error).split())
    node = re.search(r"Name: ?'([^']+)'", text) or re.search(r"[Nn]ode ?\(([^)]+)\)", text)
    return QatError(
        ErrorCode.RUN_FAILED, f"{what}: {reason(error, folder)}", node=node.group(1) if node else None
    )


def reason(error: Exception, folder: pathlib.Path | None = None) -> str:
    """The message of an onnxruntime exception on one line, without what only its developers can use."""
    text = " ".join(str(error).split()) or type(error).__name__
    if folder is not None:
        text = text.replace(f"{folder}/", "")
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    # Where a check of the C++ code failed: path on the machine that it was built on, function, condition.
    text = re.sub(r"/\S*/onnxruntime/(?:core|contrib_ops)/\S+:\d+ ", "", text)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
