"""Fake-quantized weights become integer initializers with a DequantizeLinear.

A weight that two layers share through one quantizer is stored once.
"""

from __future__ import annotations

import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.quantization import quantize


def quantize_weights(model: ir.Model) -> int:
    """Replace each FakeQuantize of an initializer, in place. Returns how many there were."""
    count = 0
    for node in model.graph.all_nodes():
        if is_fake_quantize(node) and (quantizer := read(node)).x.const_value is not None:
            _quantize_weight(quantizer)
            count += 1
    return count


def _quantize_weight(quantizer: FakeQuantize) -> None:
    graph, weight = quantizer.node.graph, quantizer.x
    scale, zero_point = quantizer.scale.const_value, quantizer.zero_point.const_value
    assert isinstance(graph, ir.Graph)
    assert weight.const_value is not None
    assert scale is not None
    assert zero_point is not None
    integers = quantize(
        weight.const_value.numpy(), scale.numpy(), zero_point.numpy(), quantizer.range, quantizer.axis
    )
    name = f"{weight.name}_quantized"
    while name in graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        shape=weight.shape,
        type=ir.TensorType(ir.DataType.from_numpy(integers.dtype)),
        const_value=ir.tensor(integers, name=name),
    )
    graph.register_initializer(value)
    attributes = {} if quantizer.axis is None else {"axis": quantizer.axis}
    dequantize = ir.node(
        "DequantizeLinear",
        [value, quantizer.scale, quantizer.zero_point],
        attributes,
        outputs=[ir.Value(name=f"{name}_dequantized", shape=weight.shape, type=weight.type)],
        name=f"{name}_DequantizeLinear",
    )
    graph.insert_before(quantizer.node, dequantize)
    ir.convenience.replace_all_uses_with(quantizer.output, dequantize.outputs[0])
    graph.remove(quantizer.node, safe=True)
    if not weight.uses() and not weight.is_graph_output():
        graph.initializers.pop(weight.name or "")
