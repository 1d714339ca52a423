"""Folds a Relu or Clip before a quantizer into the quantizer's integer range.

    quantize(clip(x, a, b)) = clip(quantize(x), quantize(a), quantize(b))

because quantization is monotonic. onnxruntime drops a Relu or Clip itself only where the integer type ends at
or inside its bounds (a Relu with zero point 0). With a symmetric range, or a Clip at 6 and a trained scale,
it does not, and the layer before stays float. For deployment only: scales must be constants.

Rules:

1. The activation's result goes into one FakeQuantize only, and its bounds are constants.
2. The quantizer is per tensor, its scale and zero point are constants; its own range is narrowed.
3. A range of one integer, or none, is left as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, read
from rewriter.initializers import constant_array
from rewriter.operators import is_operator
from rewriter.quantization import IntegerRange, quantize


def absorb_activations(model: ir.Model) -> int:
    """Fold, in place. Returns how many activations are gone."""
    return sum(_try_absorb(read(node), model.graph) for node in list(model.graph) if is_fake_quantize(node))


def _try_absorb(quantizer: FakeQuantize, graph: ir.Graph) -> bool:
    activation = quantizer.x.producer()
    if activation is None or len(quantizer.x.uses()) != 1 or quantizer.x.is_graph_output():
        return False
    bounds = _bounds(activation)
    if bounds is None or (range_ := _narrowed(quantizer, *bounds)) is None:
        return False
    quantizer.node.attributes["qmin"] = ir.AttrInt64("qmin", range_.qmin)
    quantizer.node.attributes["qmax"] = ir.AttrInt64("qmax", range_.qmax)
    quantizer.node.replace_input_with(0, activation.inputs[0])
    graph.remove(activation, safe=True)
    return True


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or a Clip with constant bounds."""
    if is_operator(node, "Relu"):
        return 0.0, np.inf
    if not is_operator(node, "Clip"):
        return None
    bounds = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:]):
        if value is None:
            continue
        bound = constant_array(value)
        if bound is None:
            return None
        bounds[index] = float(bound.reshape(()))
    return bounds[0], bounds[1]


def _narrowed(quantizer: FakeQuantize, low: float, high: float) -> IntegerRange | None:
    scale, zero_point = constant_array(quantizer.scale), constant_array(quantizer.zero_point)
    if quantizer.axis is not None or scale is None or zero_point is None or low > high:
        return None
    ends = quantize(np.array([low, high], np.float32), scale, zero_point, quantizer.range)
    qmin, qmax = (int(end) for end in ends)
    return IntegerRange(qmin, qmax) if qmin < qmax else None
