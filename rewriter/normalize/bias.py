"""Makes a constant that is added after a convolution or matrix product its bias, in the plainest form."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import add_initializer, constant_array, initializer_array
from rewriter.names import FreeNames
from rewriter.normalize.graphs import owning_graph
from rewriter.operators import is_constant


class FuseBiasPass(ir.passes.InPlacePass):
    """Fuses Add into the operator before it, and the factors of a Gemm into its constants.

    1. Add(Conv or ConvTranspose, constant): the constant is the bias, or part of it, if it has one value for
       each output channel (or one for all) and is the same at every position.
    2. Add(MatMul(x, constant [K, N]), constant [N] or [1, N]) with x known to be 2-D: becomes Gemm.
    3. The value between the two must have no other user and not be a graph output.
    4. alpha and beta of a Gemm become part of its constant B and C, which are multiplied in float64: integer
       kernels want them to be 1. Not a factor of 0, after which B or C could not be trained as before.
    5. A Gemm's constant C with one value, or of shape [1, N], becomes [N].
    6. Constants that other nodes read too stay as they are (1, 4, 5): they are one weight in training.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        names = FreeNames(model)
        for node in model.graph:
            if node.domain != "":
                continue
            if (node.op_type == "Add" and _try_fuse(node, names)) or (
                node.op_type == "Gemm" and _simplify_gemm(node)
            ):
                modified = True
        return ir.passes.PassResult(model, modified)


def _try_fuse(add: ir.Node, names: FreeNames) -> bool:
    for product, constant in (add.inputs, tuple(reversed(add.inputs))):
        producer = None if product is None else product.producer()
        if producer is None or constant is None or producer.domain != "":
            continue
        if producer.graph is not add.graph or not _only_used_by(producer.outputs[0], add):
            continue
        if producer.op_type in ("Conv", "ConvTranspose"):
            return _try_convolution(producer, add, constant, names)
        if producer.op_type == "MatMul":
            return _try_matmul(producer, add, constant, names)
    return False


def _only_used_by(value: ir.Value, node: ir.Node) -> bool:
    return len(value.uses()) == 1 and value.consumers()[0] is node and not value.is_graph_output()


def _try_convolution(convolution: ir.Node, add: ir.Node, constant: ir.Value, names: FreeNames) -> bool:
    weight, bias = convolution.inputs[1], constant_array(constant)
    old = convolution.inputs[2] if len(convolution.inputs) > 2 else None
    if old is not None and not _is_own_constant(old):
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
    if old is None:
        fused = add_initializer(owning_graph(add), names.take(f"{constant.name}_bias"), values)
        convolution.resize_inputs(3)
        convolution.replace_input_with(2, fused)
    elif initializer_array(old).shape == values.shape and values.dtype == np.float32:
        _set_values(old, initializer_array(old) + values)
    else:
        return False
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


def _try_matmul(matmul: ir.Node, add: ir.Node, constant: ir.Value, names: FreeNames) -> bool:
    x, weight = matmul.inputs
    kernel, bias = constant_array(weight), constant_array(constant)
    if x is None or x.shape is None or len(x.shape) != 2:
        return False
    if kernel is None or bias is None or kernel.ndim != 2 or kernel.dtype != np.float32:
        return False
    if bias.shape not in ((kernel.shape[1],), (1, kernel.shape[1])):
        return False
    graph = owning_graph(add)
    vector = constant
    if bias.ndim == 2:
        vector = add_initializer(graph, names.take(f"{constant.name}_bias"), bias.reshape(-1))
    gemm = ir.node("Gemm", [x, weight, vector], name=matmul.name)
    gemm.outputs[0].type, gemm.outputs[0].shape = matmul.outputs[0].type, add.outputs[0].shape
    graph.insert_before(add, gemm)
    _take_over_output(gemm, add)
    graph.remove(matmul, safe=True)
    return True


def _simplify_gemm(gemm: ir.Node) -> bool:
    """Rules 4 to 6."""
    weight, bias = gemm.inputs[1], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    modified = _is_own_constant(weight) and _absorb_factor(gemm, "alpha", weight)
    if bias is None:
        return gemm.attributes.pop("beta", None) is not None or modified
    if _is_own_constant(bias):
        modified = _absorb_factor(gemm, "beta", bias) or modified
        modified = _make_vector(bias, _channels(gemm)) or modified
    return modified


def _is_own_constant(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether it is a float32 initializer that a single node reads, once."""
    return (
        value is not None
        and is_constant(value)
        and value.dtype == ir.DataType.FLOAT
        and len(value.uses()) == 1
        and not value.is_graph_output()
    )


def _absorb_factor(gemm: ir.Node, name: str, constant: ir.Value) -> bool:
    factor = gemm.attributes.get_float(name, 1.0)
    if factor in (0.0, 1.0):
        return False
    _set_values(constant, (initializer_array(constant).astype(np.float64) * factor).astype(np.float32))
    gemm.attributes.pop(name)
    return True


def _make_vector(bias: ir.Value, channels: int | None) -> bool:
    """Write the same bias with one value per channel, if it is one for all samples."""
    array = initializer_array(bias)
    if channels is None or array.shape == (channels,) or array.shape not in ((), (1,), (1, 1), (1, channels)):
        return False
    _set_values(bias, np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (channels,))))
    return True


def _channels(gemm: ir.Node) -> int | None:
    weight = gemm.inputs[1]
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return None
    size = weight.shape[0 if gemm.attributes.get_int("transB", 0) else 1]
    return size if isinstance(size, int) else None


def _set_values(initializer: ir.Value, array: npt.NDArray[np.float32]) -> None:
    initializer.const_value = ir.tensor(array, name=initializer.name)
    initializer.shape = ir.Shape(array.shape)
