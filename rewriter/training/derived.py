"""What a checkpoint stands for: tensors of the eval model that depend on parameters and state alone.

Scales, zero points, folded weights and biases are computed in the eval model. Where qat_model.onnx has an
initializer of that name, this is its value under a checkpoint. onnxruntime computes it, with the operators of
the eval model: NumPy's exp may differ in the last bit, which moves values that lie on a rounding boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import inference
from rewriter.errors import ErrorCode, QatError

FloatArray = npt.NDArray[np.float32]


def derived_values(
    evaluation: ir.Model, parameters: Mapping[str, FloatArray], names: Iterable[str]
) -> dict[str, FloatArray]:
    """Those of `names` that the eval model computes, by name.

    Args:
        evaluation: eval_model.onnx; left as it is.
        parameters: everything in the checkpoint.

    Raises:
        QatError: `checkpoint_invalid`, a parameter that is needed is missing or has another shape.
    """
    wanted = set(names)
    clone = evaluation.clone()
    graph = clone.graph
    outputs = [o for node in graph for o in node.outputs if o.name in wanted]
    if not outputs:
        return {}
    nodes, used = _cone(outputs)
    for output in outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = outputs
    graph.remove([node for node in graph if node not in nodes], safe=False)
    graph.inputs[:] = used
    for value in used:
        _require(parameters, value)
    session = inference.open_session(ir.to_proto(clone).SerializeToString())
    feed = {value.name or "": parameters[value.name or ""] for value in used}
    found = [output.name or "" for output in outputs]
    return dict(zip(found, inference.run(session, found, feed), strict=True))


def _cone(outputs: Iterable[ir.Value]) -> tuple[set[ir.Node], list[ir.Value]]:
    """The nodes that the outputs depend on, and the graph inputs among what these read."""
    nodes: set[ir.Node] = set()
    inputs: dict[ir.Value, None] = {}
    pending = list(outputs)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            if value.is_graph_input():
                inputs[value] = None
        elif node not in nodes:
            nodes.add(node)
            pending.extend(operand for operand in node.inputs if operand is not None)
    return nodes, list(inputs)


def _require(parameters: Mapping[str, FloatArray], value: ir.Value) -> None:
    found = parameters.get(value.name or "")
    shape = () if value.shape is None else value.shape.numpy()
    if found is None or found.shape != shape:
        has = "no" if found is None else f"with the shape {list(found.shape)} the"
        raise QatError(
            ErrorCode.CHECKPOINT_INVALID,
            f"The checkpoint belongs to another bundle: it has {has} parameter {value.name!r}, which has the "
            f"shape {list(shape)} in this one.",
            field=value.name,
        )


def require_scales(values: Mapping[str, FloatArray], scales: Mapping[str, str]) -> None:
    """Raise `checkpoint_invalid` for a scale that is not a positive normal number.

    Args:
        values: scales by name, as the checkpoint makes them.
        scales: the names of those that training makes -> what it makes them of, for the message.
    """
    for name, source in scales.items():
        scale = values[name]
        if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The trained parameter {source!r} makes a scale that is 0 or not finite: "
                "training diverged. Use a smaller learning rate or an earlier checkpoint.",
                field=source,
            )
