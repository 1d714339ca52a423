"""Makes a constant that is added after a convolution or matrix product its bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.normalize.initializers import add_initializer, constant_of, owning_graph


class FuseBiasPass(ir.passes.InPlacePass):
    """Fuses Add into the operator before it.

    1. Add(Conv or ConvTranspose without bias, constant): the constant is the bias, if it has one value for
       each output channel (or one for all) and is the same at every position.
    2. Add(MatMul(x, constant [K, N]), constant [N] or [1, N]) with x known to be 2-D: becomes Gemm.
    3. The value between the two must have no other user and not be a graph output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.domain == "" and node.op_type == "Add" and _try_fuse(node):
                modified = True
        return ir.passes.PassResult(model, modified)


def _try_fuse(add: ir.Node) -> bool:
    for product, constant in (add.inputs, tuple(reversed(add.inputs))):
        producer = None if product is None else product.producer()
        if producer is None or constant is None or producer.domain != "":
            continue
        if producer.graph is not add.graph or not _only_used_by(producer.outputs[0], add):
            continue
        if producer.op_type in ("Conv", "ConvTranspose"):
            return _try_convolution(producer, add, constant)
        if producer.op_type == "MatMul":
            return _try_matmul(producer, add, constant)
    return False


def _only_used_by(value: ir.Value, node: ir.Node) -> bool:
    return len(value.uses()) == 1 and value.consumers()[0] is node and not value.is_graph_output()


def _try_convolution(convolution: ir.Node, add: ir.Node, constant: ir.Value) -> bool:
    weight, bias = convolution.inputs[1], constant_of(constant)
    if len(convolution.inputs) > 2 and convolution.inputs[2] is not None:
        return False
    if bias is None or weight is None or weight.shape is None or not weight.shape.is_static():
        return False
    shape, rank = weight.shape.numpy(), len(weight.shape)
    channels = shape[0]
    if convolution.op_type == "ConvTranspose":
        group = convolution.attributes.get_int("group", 1)
        channels = shape[1] * group
    if bias.ndim > rank:
        return False
    aligned = bias.reshape((1,) * (rank - bias.ndim) + bias.shape)
    if aligned.size != aligned.shape[1] or aligned.size not in (1, channels):
        return False
    values = np.ascontiguousarray(np.broadcast_to(aligned.reshape(-1), (channels,)))
    graph = owning_graph(add)
    convolution.resize_inputs(3)
    convolution.replace_input_with(2, add_initializer(graph, f"{constant.name}_bias", values))
    _take_over_output(convolution, add)
    return True


def _take_over_output(producer: ir.Node, add: ir.Node) -> None:
    """Remove `add`; `producer` gives its output, under the same name."""
    inner, outer = producer.outputs[0], add.outputs[0]
    name = outer.name
    outer.name = None
    inner.type, inner.shape = outer.type or inner.type, outer.shape or inner.shape
    outer.replace_all_uses_with(inner, replace_graph_outputs=True)
    owning_graph(add).remove(add, safe=True)
    inner.name = name


def _try_matmul(matmul: ir.Node, add: ir.Node, constant: ir.Value) -> bool:
    x, weight = matmul.inputs
    kernel, bias = constant_of(weight), constant_of(constant)
    if x is None or x.shape is None or len(x.shape) != 2:
        return False
    if kernel is None or bias is None or kernel.ndim != 2 or kernel.dtype != np.float32:
        return False
    if bias.shape not in ((kernel.shape[1],), (1, kernel.shape[1])):
        return False
    graph = owning_graph(add)
    vector = constant
    if bias.ndim == 2:
        vector = add_initializer(graph, f"{constant.name}_bias", bias.reshape(-1))
    gemm = ir.node("Gemm", [x, weight, vector], name=matmul.name)
    gemm.outputs[0].type, gemm.outputs[0].shape = matmul.outputs[0].type, add.outputs[0].shape
    graph.insert_before(add, gemm)
    _take_over_output(gemm, add)
    graph.remove(matmul, safe=True)
    return True
