"""Biases of quantized layers become int32 initializers with scale s_x * s_w and zero point 0.

Integer kernels add the bias to the int32 accumulator of x_q * w_q, so its scale has no freedom: one step of
the bias is one step of the accumulator. Where a bias does not fit (a channel whose weights are tiny beside
its bias), the channel's weight scale is raised until it does: the weights then lose precision that the
accumulator could not have shown beside the bias anyway.

Rules, layer by layer (Conv, ConvTranspose, Gemm):

1. the input and the weight are both fake-quantized, the input per tensor; otherwise the bias stays float;
2. the bias is a float initializer with one value per output channel; a Gemm's must also have alpha and
   beta 1, because onnxruntime's QGemm ties the bias to the bare accumulator;
3. layers that share a bias get an int32 copy each: their scales differ.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.operators import traits_of

# Half of int32: the other half is left to the accumulated products.
LARGEST_BIAS = 2**30


@dataclasses.dataclass(frozen=True)
class RaisedScale:
    """A weight whose scale was raised on some channels so that the bias fits into int32."""

    node: str
    channels: int


def quantize_biases(model: ir.Model) -> list[RaisedScale]:
    """Carry the rules of this module out, in place. Call before the weights become integers."""
    raised = []
    for node in model.graph.all_nodes():
        if (bias := _quantizable_bias(node)) is not None and (change := _quantize_bias(node, *bias)):
            raised.append(change)
    return raised


def _quantizable_bias(node: ir.Node) -> tuple[FakeQuantize, FakeQuantize, ir.Value] | None:
    """Quantizers of input and weight, and the bias, where rules 1 and 2 hold."""
    traits = traits_of(node)
    if traits is None or traits.weight is None or traits.bias is None or len(node.inputs) <= traits.bias:
        return None
    x, weight, bias = node.inputs[traits.data], node.inputs[traits.weight], node.inputs[traits.bias]
    if x is None or weight is None or bias is None or bias.const_value is None:
        return None
    x_node, weight_node = x.producer(), weight.producer()
    if x_node is None or not is_fake_quantize(x_node):
        return None
    if weight_node is None or not is_fake_quantize(weight_node):
        return None
    x_quantizer, weight_quantizer = read(x_node), read(weight_node)
    if x_quantizer.axis is not None or weight_quantizer.x.const_value is None:
        return None
    if node.op_type == "Gemm" and any(
        node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
    ):
        return None
    channels = weight_quantizer.scale.const_value
    if bias.dtype != ir.DataType.FLOAT or channels is None or bias.const_value.size <= 1:
        return None
    if channels.size not in (1, bias.const_value.size):
        return None
    return x_quantizer, weight_quantizer, bias


def _quantize_bias(
    node: ir.Node, x: FakeQuantize, weight: FakeQuantize, bias: ir.Value
) -> RaisedScale | None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    assert bias.const_value is not None
    values = bias.const_value.numpy().astype(np.float64).reshape(-1)
    x_scale = _scale(x).astype(np.float64)
    weight_scale = _scale(weight)

    needed = np.abs(values) / (x_scale * LARGEST_BIAS)
    if weight_scale.ndim == 0:
        needed = needed.max()
    raised = weight_scale < needed
    if raised.any():
        weight_scale = np.maximum(weight_scale, needed).astype(np.float32)
        weight.scale.const_value = ir.tensor(weight_scale, name=weight.scale.name)

    scale = (x_scale * weight_scale.astype(np.float64)).astype(np.float32)
    quantized = np.rint(values / scale).astype(np.int32)
    prefix = f"{node.name}_bias"
    integer = _initializer(graph, f"{prefix}_quantized", quantized)
    step = _initializer(graph, f"{prefix}_scale", scale)
    zero = _initializer(graph, f"{prefix}_zero_point", np.zeros(scale.shape, np.int32))
    attributes = {"axis": 0} if scale.ndim else {}
    dequantize = ir.node(
        "DequantizeLinear", [integer, step, zero], attributes, name=f"{prefix}_DequantizeLinear"
    )
    dequantize.outputs[0].name = f"{prefix}_dequantized"
    dequantize.outputs[0].dtype = ir.DataType.FLOAT
    dequantize.outputs[0].shape = ir.Shape(quantized.shape)
    graph.insert_before(node, dequantize)
    traits = traits_of(node)
    assert traits is not None
    assert traits.bias is not None
    node.replace_input_with(traits.bias, dequantize.outputs[0])
    return RaisedScale(node.name or "", int(np.count_nonzero(raised))) if raised.any() else None


def _scale(quantizer: FakeQuantize) -> npt.NDArray[np.float32]:
    assert quantizer.scale.const_value is not None
    return quantizer.scale.const_value.numpy()


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value
