"""Small graphs for tests: written as ONNX text, shown as one line a node."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import ShapeInferencePass

from rewriter.fake_quantize import is_fake_quantize, is_fake_quantize_bias
from rewriter.insertion import insert
from rewriter.placement import place
from rewriter.quantization import Plan, QuantizerParameters, parameters_from_range
from rewriter.recipe import Recipe


def graph(text: str, **values: np.ndarray) -> ir.Model:
    """A model of opset 18 from the text of its graph.

    Tensors declared in the text that no node makes are initializers: as given in `values`, or random.
    Nodes without a name are called after their first output.
    """
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18, "qat" : 1]>\n{text}')
    made = {name for node in proto.graph.node for name in node.output}
    rng = np.random.default_rng(0)
    declared = [info for info in proto.graph.value_info if info.name not in made]
    for info in declared:
        proto.graph.value_info.remove(info)
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        array = values.get(info.name)
        if array is None:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            array = rng.standard_normal(shape).astype(dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), info.name))
    model = ir.from_proto(proto)
    ShapeInferencePass()(model)
    for node in model.graph.all_nodes():
        node.name = node.name or f"{node.outputs[0].name}_node"
    return model


def listing(model: ir.Model) -> str:
    """One line a node: outputs = Operator(inputs); FQ is a quantizer with the name of its scale."""
    lines = []
    for node in model.graph:
        outputs = ", ".join(output.name or "" for output in node.outputs)
        inputs = [value.name or "" if value is not None else "-" for value in node.inputs]
        if is_fake_quantize(node):
            axis = node.attributes.get("axis")
            marks = "" if axis is None else f" axis {axis.as_int()}"
            marks += " on grid" if node.attributes["on_grid"].as_int() else ""
            lines.append(f"{outputs} = FQ({inputs[0]} by {inputs[1]}{marks})")
        elif is_fake_quantize_bias(node):
            lines.append(f"{outputs} = FQ({inputs[0]} by {inputs[1]} * {inputs[2]})")
        else:
            lines.append(f"{outputs} = {node.op_type}({', '.join(inputs)})")
    return "\n".join(lines)


def ranges_of(model: ir.Model, plan: Plan) -> dict[str, QuantizerParameters]:
    """Parameters for every quantizer of the plan: weights from their values, activations cover [-3, 4]."""
    parameters = {}
    for quantizer in plan.quantizers:
        low, high = np.float64(-3), np.float64(4)
        if quantizer.kind == "weight":
            array = model.graph.initializers[quantizer.tensors[0].name].const_value.numpy()
            others = tuple(axis for axis in range(array.ndim) if axis != quantizer.axis)
            low, high = array.min(axis=others), array.max(axis=others)
        scale, zero_point = parameters_from_range(low, high, quantizer.range, symmetric=quantizer.symmetric)
        parameters[quantizer.name] = QuantizerParameters(scale, zero_point, "test")
    return parameters


def quantized(model: ir.Model, recipe: Recipe | None = None) -> Plan:
    """Place and insert quantizers with some parameters."""
    plan = place(model, recipe or Recipe())
    insert(model, plan, ranges_of(model, plan))
    return plan


def run(model: ir.Model, *, optimized: bool = False, **inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs, computed by onnxruntime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, inputs)
