"""Plain onnxruntime sessions on the CPU: quiet, and with errors that a person can read."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy.typing as npt
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from rewriter.errors import ErrorCode, QatError

# On x86 without VNNI onnxruntime's kernels for int8 weights (int8 activations become uint8 for them) add
# pairs of products in 16 bits, which saturate: vpmaddubsw; two of 255 x 127 are 64770, and 32767 is the most;
# two of 255 x 63 fit. With this entry it takes slower ones, for uint8 weights, that do not. Elsewhere it
# changes nothing in onnxruntime 1.19.
NO_SATURATION: Final = ("session.x64quantprecision", "1")

_LONGEST_REASON: Final = 400
_ERRORS_ONLY: Final = 3
_NOTHING: Final = 4


def session_options(*, optimize: bool = True, may_saturate: bool = True) -> onnxruntime.SessionOptions:
    """Options of a session that prints nothing: its errors arrive as exceptions.

    Args:
        may_saturate: False: sums of integer products do not, on any CPU (`NO_SATURATION`).
    """
    options = _options_for_this_process()
    options.log_severity_level = _NOTHING
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not may_saturate:
        options.add_session_config_entry(*NO_SATURATION)
    return options


def training_options() -> onnxruntime.SessionOptions:
    """Options of a training session, whose native code also reports errors in its log alone."""
    options = _options_for_this_process()
    options.log_severity_level = _ERRORS_ONLY
    return options


def _options_for_this_process() -> onnxruntime.SessionOptions:
    """As many threads as the process may use cores (`taskset`, a container's cpuset).

    Left alone, onnxruntime counts the machine's cores and binds a thread to each, out of the process's set.
    """
    options = onnxruntime.SessionOptions()
    if hasattr(os, "sched_getaffinity"):  # Linux
        allowed = len(os.sched_getaffinity(0))
        if allowed < (os.cpu_count() or 1):
            options.intra_op_num_threads = allowed
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
        failure = run_failed("onnxruntime does not take the model", error, folder)
        if failure.node is None and not isinstance(model, bytes):
            failure.node = _only_node_of_operator(model, failure.message)
        raise failure from error


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
    node = re.search(r"Name: ?'([^']+)'", text) or re.search(r"\b[Nn]ode ?\(([^)]+)\)", text)
    return QatError(
        ErrorCode.RUN_FAILED, f"{what}: {reason(error, folder)}", node=node.group(1) if node else None
    )


def reason(error: Exception, folder: pathlib.Path | None = None) -> str:
    """The message of an onnxruntime exception on one line, without what only its developers can use."""
    text = " ".join(str(error).split()) or type(error).__name__
    if folder is not None:
        text = text.replace(f"{folder}/", "")
    # An error inside an error: the innermost says what is wrong.
    text = _NESTED.split(text)[-1]
    text = _SOURCE_LINE.sub("", text)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


_NESTED: Final = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
# Where a check of the C++ code failed: file and line, then the function with or without its signature.
_SOURCE_LINE: Final = re.compile(
    r"(?:/\S+/)?[\w.]+\.(?:cc|cpp|h|cu):\d+ "
    r"(?:[\w<>*&, :]*\w::[\w<>*&,~ :]*\([^()]*\)(?:::<lambda\([^()]*\)>)?(?: const)? )?"
)


def _only_node_of_operator(model: pathlib.Path, message: str) -> str | None:
    """The node that a message means that names its operator alone, if the model has one such node."""
    try:
        nodes = onnx.load(model, load_external_data=False).graph.node
    except (OSError, DecodeError):
        return None
    words = set(re.findall(r"\w+", message))
    found = [node.name for node in nodes if node.op_type in words]
    return found[0] if len(found) == 1 else None
