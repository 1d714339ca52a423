"""Run parts of a model in onnxruntime: a session whose outputs are chosen tensors."""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.errors import ErrorCode, QatError
from rewriter.fake_quantize import is_fake_quantize
from rewriter.lowering import lower

# Adds nodes that compute from the chosen tensors what is wanted of them, and returns their outputs.
Outputs = Callable[[ir.Model, Sequence[ir.Value]], Sequence[ir.Value]]

_LONGEST_MESSAGE: Final = 400


class TensorSession:
    """Computes chosen tensors of a model; nodes that they do not need are left out.

    The model itself stays as it is. Weights go to a temporary file that onnxruntime maps into memory, so
    that there is no second copy of them and no limit of 2 GiB.
    """

    def __init__(self, model: ir.Model, tensors: Sequence[str], outputs: Outputs | None = None) -> None:
        """Make a session that computes `tensors`, or what `outputs` makes of them.

        Args:
            tensors: names of node outputs of the main graph.

        Raises:
            QatError: `run_failed`, onnxruntime does not take the model.
        """
        clone = model.clone()
        graph = clone.graph
        produced = {value.name: value for node in graph for value in node.outputs}
        values = [produced[name] for name in tensors]
        chosen = list(values if outputs is None else outputs(clone, values))
        for value in chosen:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        graph.outputs[:] = chosen
        RemoveUnusedNodesPass()(clone)
        if any(is_fake_quantize(node) for node in graph.all_nodes()):
            lower(clone, saturation="between")
        self._names = [value.name or "" for value in chosen]
        self._session = _start(clone)
        self._inputs = {value.name for value in self._session.get_inputs()}

    def run(self, feed: Mapping[str, npt.NDArray[Any]], samples: str) -> list[npt.NDArray[Any]]:
        """The tensors, in the order asked for. They belong to onnxruntime's arena: copy what is kept.

        Args:
            samples: which samples the feed holds, for the error message.

        Raises:
            QatError: `run_failed`, naming the node if onnxruntime does.
        """
        try:
            results: list[npt.NDArray[Any]] = self._session.run(
                self._names, {name: values for name, values in feed.items() if name in self._inputs}
            )
        except Exception as error:  # onnxruntime raises several classes that have only this one in common
            raise run_failed(f"onnxruntime could not run the model on {samples}", error) from error
        return results


def run_failed(what: str, error: Exception) -> QatError:
    """The `run_failed` error of an onnxruntime exception: its message shortened, its node as a field."""
    text = " ".join(str(error).split())
    node = re.search(r"Name: ?'([^']+)'", text) or re.search(r"[Nn]ode \(([^)]+)\)", text)
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    message = re.sub(r"/\S*/(onnxruntime/core/)", r"\1", message)  # paths of the machine it was built on
    if len(message) > _LONGEST_MESSAGE:
        message = message[: _LONGEST_MESSAGE - 3] + "..."
    return QatError(ErrorCode.RUN_FAILED, f"{what}: {message}", node=node.group(1) if node else None)


def _start(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    with tempfile.TemporaryDirectory(prefix="onnx-qat-") as folder:
        path = pathlib.Path(folder, "model.onnx")
        ir.save(model, path, external_data="weights")
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # see run
            raise run_failed("onnxruntime does not take the model", error) from error
