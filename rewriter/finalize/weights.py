"""Fake-quantized weights become integer initializers with a DequantizeLinear.

A weight that two layers share through one quantizer is stored once.
"""

from __future__ import annotations

import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.initializers import add_initializer, initializer_array
from rewriter.names import FreeNames
from rewriter.operators import is_constant
from rewriter.quantization import quantize


def quantize_weights(model: ir.Model) -> int:
    """Replace each FakeQuantize of an initializer, in place. Returns how many there were."""
    count = 0
    names = FreeNames(model)
    for node in model.graph.all_nodes():
        if is_fake_quantize(node) and is_constant((quantizer := read(node)).x):
            _quantize_weight(quantizer, names)
            count += 1
    return count


def _quantize_weight(quantizer: FakeQuantize, names: FreeNames) -> None:
    graph, weight = quantizer.node.graph, quantizer.x
    assert isinstance(graph, ir.Graph)
    values, scale, zero_point = map(initializer_array, (weight, quantizer.scale, quantizer.zero_point))
    name = names.take(f"{weight.name}_quantized")
    integers = quantize(values, scale, zero_point, quantizer.range, quantizer.axis)
    value = add_initializer(graph, name, integers)
    attributes = {} if quantizer.axis is None else {"axis": quantizer.axis}
    dequantize = ir.node(
        "DequantizeLinear",
        [value, quantizer.scale, quantizer.zero_point],
        attributes,
        outputs=[ir.Value(name=names.take(f"{name}_dequantized"), shape=weight.shape, type=weight.type)],
        name=names.take(f"{name}_DequantizeLinear"),
    )
    graph.insert_before(quantizer.node, dequantize)
    ir.convenience.replace_all_uses_with(quantizer.output, dequantize.outputs[0])
    graph.remove(quantizer.node, safe=True)
    if not weight.uses() and not weight.is_graph_output():
        graph.initializers.pop(weight.name or "")
