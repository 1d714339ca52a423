"""Biases of quantized layers, rounded in training as they will be in the int8 model.

Integer kernels add the bias to the int32 accumulator of x_q * w_q, so its scale is s_x * s_w and has no
freedom: biases need no quantizer of their own in a plan. Rounding them in the QAT and the training models too
makes the finalized model compute the same numbers; rounded in the end only, a deep network drifts by many
steps of its output, because each value that falls on the other side of a rounding boundary moves by a step.

Rules, layer by layer (Conv, ConvTranspose, Gemm):

1. input and weight are both fake-quantized, the input per tensor; otherwise the bias stays float;
2. the bias is a float32 initializer with one value per output channel; a Gemm's must also have alpha and
   beta 1, because onnxruntime's QGemm ties the bias to the bare accumulator;
3. layers that share a bias round it each for themselves: their scales differ.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, make_bias, read
from rewriter.names import FreeNames
from rewriter.operators import is_constant, is_operator, traits_of


def insert_bias_quantizers(model: ir.Model) -> None:
    """Put a FakeQuantizeBias before every bias that the rules allow, in place."""
    _insert(model, list(model.graph))


def _insert(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    names = FreeNames(model)
    for node in nodes:
        found = _quantizers_and_bias(node)
        if found is None:
            continue
        x, weight, bias, index = found
        quantizer = make_bias(bias, x.scale, weight.scale, name=names.take(f"{node.name}_bias_fake_quantize"))
        output = quantizer.outputs[0]
        output.name = names.take(output.name or "")
        model.graph.insert_before(node, quantizer)
        node.replace_input_with(index, output)


def raise_bias_quantizers(model: ir.Model) -> int:
    """Turn the lowered form, Mul(Round(Div(bias, step)), step), back into FakeQuantizeBias nodes, in place.

    Returns how many there were.
    """
    raised = []
    for node in list(model.graph):
        traits = traits_of(node)
        if traits is None or traits.bias is None or traits.bias >= len(node.inputs):
            continue
        bias = _lowered_bias(node.inputs[traits.bias])
        if bias is not None:
            node.replace_input_with(traits.bias, bias)
            raised.append(node)
    _insert(model, raised)
    return len(raised)


def _quantizers_and_bias(node: ir.Node) -> tuple[FakeQuantize, FakeQuantize, ir.Value, int] | None:
    """Quantizers of input and weight, the bias and which input it is, where the rules hold."""
    traits = traits_of(node)
    if traits is None or traits.weight is None or traits.bias is None or traits.bias >= len(node.inputs):
        return None
    x, weight, bias = node.inputs[traits.data], node.inputs[traits.weight], node.inputs[traits.bias]
    if bias is None or not is_constant(bias) or bias.dtype != ir.DataType.FLOAT or bias.shape is None:
        return None
    x_quantizer, weight_quantizer = _quantizer(x), _quantizer(weight)
    if x_quantizer is None or x_quantizer.axis is not None:
        return None
    if weight_quantizer is None or not is_constant(weight_quantizer.x):
        return None
    scaled = (node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    if is_operator(node, "Gemm") and any(scaled):
        return None
    # One value per channel along the last axis: [C], or a Gemm's [1, C].
    dims = tuple(bias.shape)
    scales = weight_quantizer.scale.shape
    if not dims or any(dim != 1 for dim in dims[:-1]) or scales is None:
        return None
    if len(scales) and tuple(scales) != dims[-1:]:
        return None
    return x_quantizer, weight_quantizer, bias, traits.bias


def _quantizer(value: ir.Value | None) -> FakeQuantize | None:
    producer = None if value is None else value.producer()
    return read(producer) if producer is not None and is_fake_quantize(producer) else None


def rounding_of_biases(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of the lowered form that stand before biases, with the product that is the step."""
    nodes: set[ir.Node] = set()
    for node in graph:
        traits = traits_of(node)
        if traits is None or traits.bias is None or traits.bias >= len(node.inputs):
            continue
        value = node.inputs[traits.bias]
        product = None if value is None else value.producer()
        if product is None or _lowered_bias(value) is None:
            continue
        rounding, step = (operand.producer() for operand in product.inputs if operand is not None)
        division = None if rounding is None or rounding.inputs[0] is None else rounding.inputs[0].producer()
        if step is not None and is_operator(step, "Mul"):
            nodes.update(part for part in (product, rounding, division, step) if part is not None)
    return nodes


def _lowered_bias(value: ir.Value | None) -> ir.Value | None:
    product = None if value is None else value.producer()
    if product is None or not is_operator(product, "Mul"):
        return None
    rounded, step = product.inputs
    rounding = None if rounded is None else rounded.producer()
    if rounding is None or step is None or not is_operator(rounding, "Round") or rounding.inputs[0] is None:
        return None
    division = rounding.inputs[0].producer()
    if division is None or not is_operator(division, "Div") or division.inputs[1] is not step:
        return None
    return division.inputs[0]
