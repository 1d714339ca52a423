"""Replaces nodes that have only constant inputs by initializers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx_ir as ir

from rewriter.initializers import add_initializer, constant_array
from rewriter.normalize.opset import OPSET
from rewriter.normalize.quantize_pairs import quantizer_arithmetic


@dataclasses.dataclass(frozen=True)
class FoldLimits:
    """Bounds on what folding may add.

    Attributes:
        growth_bytes: all folded tensors together, minus what they are computed from.
        tensor_bytes: one folded tensor.
    """

    growth_bytes: int = 2 * 2**30
    tensor_bytes: int = 2**30


# Operators that are a function of their inputs alone and cost about as much as their output is large.
# QuantizeLinear and DequantizeLinear are left for RaiseQuantizePairs.
FOLDABLE: Final = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "ConstantOfShape", "Cos", "Div"),
        *("Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND"),
        *("Gemm", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "MatMul", "Max"),
        *("Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range", "Reciprocal", "ReduceMax"),
        *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round", "Shape"),
        *("Sigmoid", "Sign", "Sin", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh"),
        *("Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor"),
    }
)


class FoldConstantsPass(ir.passes.InPlacePass):
    """Evaluates constant sub-graphs, in graph order.

    1. A node of `FOLDABLE` whose inputs are all initializers is computed with ONNX's reference
       implementation, and its outputs become initializers. One that is a graph output stays.
    2. The size of the result is inferred before it is computed: what cannot be inferred, or is over the
       limits, stays as it is.
    3. Nodes in subgraphs stay as they are; they may read folded values.
    4. The saturation and rounding that belong to quantizers the model came with stay: RaiseQuantizePairs
       reads them.

    A weight of two or more dimensions that is folded and also used elsewhere is no longer one weight:
    `warnings` names it.
    """

    def __init__(self, limits: FoldLimits = FoldLimits()) -> None:
        super().__init__()
        self._limits = limits
        self._growth = 0
        self.warnings: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self._growth, self.warnings = 0, []
        folded = 0
        copied: dict[ir.Value, ir.Node] = {}
        kept = quantizer_arithmetic(model.graph)
        for node in model.graph:
            if node in kept:
                continue
            weights = [value for value in node.inputs if value is not None and _is_weight(value)]
            if self._try_fold(model.graph, node):
                folded += 1
                for weight in weights:
                    copied.setdefault(weight, node)
        for weight, node in copied.items():
            if weight.uses():
                self.warnings.append(
                    f"Weight {weight.name!r} is used directly and through {node.op_type} {node.name!r}; "
                    "training changes the two separately."
                )
        return ir.passes.PassResult(model, bool(folded))

    def _try_fold(self, graph: ir.Graph, node: ir.Node) -> bool:
        if node.domain != "" or node.op_type not in FOLDABLE:
            return False
        if any(output.is_graph_output() for output in node.outputs):
            return False
        inputs = [constant_array(value) for value in node.inputs]
        for value, array in zip(node.inputs, inputs, strict=True):
            if value is not None and array is None:
                return False
        sizes = _output_bytes(node, inputs)
        if sizes is None or max(sizes) > self._limits.tensor_bytes:
            return False
        growth = max(sum(sizes) - sum(array.nbytes for array in inputs if array is not None), 0)
        if self._growth + growth > self._limits.growth_bytes:
            return False
        outputs = _evaluate(node, inputs)
        if outputs is None:
            return False
        self._growth += growth
        for value, array in zip(node.outputs, outputs, strict=True):
            _make_initializer(graph, value, array)
        operands = dict.fromkeys(node.inputs)
        graph.remove(node, safe=True)
        for value in operands:
            if value is not None and not value.uses() and not value.is_graph_output():
                graph.initializers.pop(str(value.name), None)
        return True


def _is_weight(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT and value.shape is not None and len(value.shape) >= 2


def _make_initializer(graph: ir.Graph, value: ir.Value, array: npt.NDArray[np.generic]) -> None:
    """Let an initializer of the same name take the place of a node's output."""
    name = value.name or ""
    value.name = None
    value.replace_all_uses_with(add_initializer(graph, name, array))


def _output_bytes(node: ir.Node, inputs: Sequence[npt.NDArray[np.generic] | None]) -> list[int] | None:
    """Bytes of each output, from shape inference on this node alone; None where it is not known."""
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=OPSET, domain="")
    types, data = {}, {}
    for value, array in zip(node.inputs, inputs, strict=True):
        if value is None or array is None:
            continue
        dtype = ir.DataType.from_numpy(array.dtype)
        types[str(value.name)] = onnx.helper.make_tensor_type_proto(dtype.value, array.shape)
        if array.size <= _SHAPE_DATA_ELEMENTS:
            data[str(value.name)] = ir.to_proto(ir.tensor(array, name=value.name))
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, ir.to_proto(node), types, data, opset_imports=[onnx.helper.make_opsetid("", OPSET)]
        )
    except (onnx.shape_inference.InferenceError, KeyError, ValueError, RuntimeError):
        return None
    sizes = []
    for value in node.outputs:
        inferred_type = inferred.get(str(value.name))
        if inferred_type is None or not inferred_type.tensor_type.HasField("shape"):
            return None
        elements = 1
        for dim in inferred_type.tensor_type.shape.dim:
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                return None
            elements *= dim.dim_value
        sizes.append(elements * ir.DataType(inferred_type.tensor_type.elem_type).itemsize)
    return [int(size) for size in sizes]


# Shapes, axes, pads and repeats are small; weights are not needed to infer a shape.
_SHAPE_DATA_ELEMENTS: Final = 64


def _evaluate(
    node: ir.Node, inputs: Sequence[npt.NDArray[np.generic] | None]
) -> list[npt.NDArray[np.generic]] | None:
    """The node's outputs, or None where the reference implementation cannot compute them."""
    feeds = {
        str(value.name): array
        for value, array in zip(node.inputs, inputs, strict=True)
        if value is not None and array is not None
    }
    try:
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(node), opsets={"": OPSET})
        with np.errstate(all="ignore"):
            outputs = evaluator.run(None, feeds)
    except Exception:  # any operator of the reference may fail in its own way; the node then stays
        return None
    arrays = []
    for value, output in zip(node.outputs, outputs, strict=True):
        array = np.asarray(output)
        if value.dtype is not None and array.dtype != value.dtype.numpy():
            return None
        # A broadcast view would be a full-size tensor in the file with one element in memory: own it.
        arrays.append(np.ascontiguousarray(array).reshape(array.shape))
    return arrays
