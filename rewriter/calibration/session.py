"""Run parts of a model in onnxruntime: a session whose outputs are chosen tensors."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter import inference
from rewriter.fake_quantize import is_fake_quantize
from rewriter.lowering import lower

# Adds nodes that compute from the chosen tensors what is wanted of them, and returns their outputs.
Outputs = Callable[[ir.Model, Sequence[ir.Value]], Sequence[ir.Value]]


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
        wanted = {name: values for name, values in feed.items() if name in self._inputs}
        return inference.run(self._session, self._names, wanted, samples)


def _start(model: ir.Model) -> onnxruntime.InferenceSession:
    with tempfile.TemporaryDirectory(prefix="onnx-qat-") as folder:
        path = pathlib.Path(folder, "model.onnx")
        ir.save(model, path, external_data="weights")
        return inference.open_session(path)
