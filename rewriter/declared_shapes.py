"""Shapes that a model file declares and its operators do not compute: exporters leave them after surgery.

onnxruntime's inference puts up with them. Gradients are built from shapes, so they must be right.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import onnx
from onnx import TensorProto


def drop_false_shapes(proto: onnx.ModelProto) -> str | None:
    """Drop, in place, all shapes that the graph declares for what it computes, if one of them is false.

    Returns:
        The name of a value with a false shape; None where there is none, and nothing is changed.
    """
    declared = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
    if not any(_has_shape(value) for value in declared.values()):
        return None
    try:
        # Without data propagation: it would compute a Range of any length, and the graph is not bounded yet.
        inferred = onnx.shape_inference.infer_shapes(_without_shapes(proto), data_prop=False).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None
    for value in (*inferred.value_info, *inferred.output):
        if value.name in declared and _contradict(_dims(declared[value.name]), _dims(value)):
            for other in declared.values():
                other.type.tensor_type.ClearField("shape")
            return str(value.name)
    return None


def _without_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with no more than the shapes of inputs and weights; of the data only what can be shapes."""
    stripped = onnx.ModelProto(ir_version=proto.ir_version)
    stripped.opset_import.extend(proto.opset_import)
    stripped.functions.extend(proto.functions)
    graph = stripped.graph
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    inputs = {value.name for value in proto.graph.input}
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value <= 0:  # some exporters write so what is not known
                dim.Clear()
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) < 2 and sum(tensor.dims) <= _RANK:
            graph.initializer.append(tensor)
        if tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in proto.graph.output:
        output = graph.output.add(name=value.name)
        output.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return stripped


_RANK: Final = 32


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"))


def _dims(value: onnx.ValueInfoProto) -> list[int | None] | None:
    if not _has_shape(value):
        return None
    dims: Iterable[onnx.TensorShapeProto.Dimension] = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]


def _contradict(declared: list[int | None] | None, inferred: list[int | None] | None) -> bool:
    if declared is None or inferred is None:
        return False
    if len(declared) != len(inferred):
        return True
    return any(a != b for a, b in zip(declared, inferred, strict=True) if a is not None and b is not None)
