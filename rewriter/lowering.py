"""Lowering: FakeQuantize nodes become QuantizeLinear/DequantizeLinear pairs of opset 13..18.

Where the quantizer's range is narrower than its integer type (fewer bits, narrow range), something must
saturate:

* "before": the float tensor is clipped to [(qmin - z) * s, (qmax - z) * s]. Standard everywhere, and the
  bounds are computed in the graph, from the scale, because scales are trained.
* "between": the integers are clipped. onnxruntime then still finds its integer kernels, while a float Clip
  keeps the operator before it in float. Signed activations are written in uint8, 128 higher, which changes
  nothing else: onnxruntime's x86 kernels are for unsigned activations, and it converts signed pairs itself
  only where nothing stands in between, and not before every operator.

Biases become Round(bias / step) * step with step = s_x * s_w.

Both give exactly `quantization.quantize` and `dequantize`. Tensors that are on the grid already need no
saturation.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantize, is_fake_quantize, is_fake_quantize_bias, read, read_bias
from rewriter.initializers import add_initializer, initializer_array
from rewriter.names import FreeNames
from rewriter.operators import is_constant

Saturation = Literal["before", "between"]


def lower(model: ir.Model, *, saturation: Saturation) -> None:
    """Replace every FakeQuantize of the graph by a Q/DQ pair, and every FakeQuantizeBias, in place.

    Scales may be initializers or computed; zero points must be initializers.
    """
    nodes = [node for node in model.graph if is_fake_quantize(node)]
    zero_points = [read(node).zero_point for node in nodes]
    lowering = _Lowering(model)
    for node in list(model.graph):
        if is_fake_quantize_bias(node):
            lowering.round_bias(node)
    for node in nodes:
        quantizer = read(node)  # anew: its input may be the output of one that is lowered now
        if saturation == "before":
            lowering.saturate_before(quantizer)
        else:
            lowering.saturate_between(quantizer)
    for zero_point in zero_points:
        if not zero_point.uses():  # replaced by a shifted one
            model.graph.initializers.pop(zero_point.name or "", None)


class _Lowering:
    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(model)
        # What quantizers share: bounds of one scale, integer constants of the whole graph.
        self._bounds: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        self._integers: dict[tuple[int, np.dtype[np.integer]], ir.Value] = {}
        self._shifted: dict[ir.Value, ir.Value] = {}

    def saturate_before(self, quantizer: FakeQuantize) -> None:
        x, nodes = quantizer.x, []
        if _saturates(quantizer):
            low, high = self._float_bounds(quantizer)
            if quantizer.axis is None:
                nodes = [self._node("Clip", [x, low, high], x, "clipped")]
            else:
                nodes = [self._node("Max", [x, low], x, "above_low")]
                nodes.append(self._node("Min", [nodes[0].outputs[0], high], x, "clipped"))
            x = nodes[-1].outputs[0]
        quantize = self._quantize(quantizer, x, quantizer.zero_point)
        dequantize = self._dequantize(quantizer, quantize.outputs[0], quantizer.zero_point)
        self._replace(quantizer, [*nodes, quantize, dequantize])

    def saturate_between(self, quantizer: FakeQuantize) -> None:
        shift = _is_signed_activation(quantizer)
        zero_point = self._shift(quantizer.zero_point) if shift else quantizer.zero_point
        quantize = self._quantize(quantizer, quantizer.x, zero_point)
        nodes = [quantize]
        if _saturates(quantizer):
            dtype, offset = (np.dtype(np.uint8), 128) if shift else (_storage(quantizer), 0)
            ends = (quantizer.range.qmin + offset, quantizer.range.qmax + offset)
            bounds = [self._integer(end, dtype) for end in ends]
            nodes.append(self._node("Clip", [quantize.outputs[0], *bounds], quantizer.x, "saturated"))
            nodes[-1].outputs[0].type = quantize.outputs[0].type
        nodes.append(self._dequantize(quantizer, nodes[-1].outputs[0], zero_point))
        self._replace(quantizer, nodes)

    def round_bias(self, node: ir.Node) -> None:
        """Round and the two products are all that int32 does to a bias: it is never out of range."""
        bias = read_bias(node)
        step = self._node("Mul", [bias.x_scale, bias.weight_scale], bias.weight_scale, "bias_step")
        quotient = self._node("Div", [bias.bias, step.outputs[0]], bias.bias, "steps")
        rounded = self._node("Round", [quotient.outputs[0]], bias.bias, "rounded_steps")
        product = self._node("Mul", [rounded.outputs[0], step.outputs[0]], bias.bias, "rounded")
        ir.convenience.replace_nodes_and_values(
            self._graph,
            node,
            [node],
            [step, quotient, rounded, product],
            [node.outputs[0]],
            [product.outputs[0]],
        )

    def _shift(self, zero_point: ir.Value) -> ir.Value:
        if zero_point not in self._shifted:
            shifted = (initializer_array(zero_point).astype(np.int64) + 128).astype(np.uint8)
            self._shifted[zero_point] = self._constant(f"{zero_point.name}_uint8", shifted)
        return self._shifted[zero_point]

    def _float_bounds(self, quantizer: FakeQuantize) -> tuple[ir.Value, ir.Value]:
        """(qmin - z) * s and (qmax - z) * s, of shape [], or broadcasting along the axis."""
        rank = None if quantizer.axis is None else _rank(quantizer.x)
        key = (quantizer.scale, quantizer.zero_point, quantizer.range, quantizer.axis, rank)
        if key not in self._bounds:
            self._bounds[key] = (
                self._float_bound(quantizer, quantizer.range.qmin, "low"),
                self._float_bound(quantizer, quantizer.range.qmax, "high"),
            )
        return self._bounds[key]

    def _float_bound(self, quantizer: FakeQuantize, bound: int, label: str) -> ir.Value:
        scale = quantizer.scale
        steps = (bound - initializer_array(quantizer.zero_point).astype(np.int64)).astype(np.float32)
        shape: list[int] = []
        if quantizer.axis is not None:
            shape = [1] * _rank(quantizer.x)
            shape[quantizer.axis] = -1
            steps = steps.reshape(shape)
            scale = self._along_axis(quantizer, shape)
        constant = self._constant(f"{quantizer.scale.name}_{label}_steps", steps)
        product = self._node("Mul", [scale, constant], quantizer.scale, label)
        product.outputs[0].shape = constant.shape
        self._graph.insert_before(quantizer.node, product)
        return product.outputs[0]

    def _along_axis(self, quantizer: FakeQuantize, shape: list[int]) -> ir.Value:
        target = self._constant(f"{quantizer.scale.name}_shape", np.array(shape, np.int64))
        reshape = self._node("Reshape", [quantizer.scale, target], quantizer.scale, "along_axis")
        reshape.outputs[0].shape = None
        self._graph.insert_before(quantizer.node, reshape)
        return reshape.outputs[0]

    def _quantize(self, quantizer: FakeQuantize, x: ir.Value, zero_point: ir.Value) -> ir.Node:
        node = self._node("QuantizeLinear", [x, quantizer.scale, zero_point], quantizer.x, "quantized")
        node.outputs[0].type = ir.TensorType(zero_point.dtype) if zero_point.dtype else None
        return _with_axis(node, quantizer.axis)

    def _dequantize(self, quantizer: FakeQuantize, q: ir.Value, zero_point: ir.Value) -> ir.Node:
        node = self._node("DequantizeLinear", [q, quantizer.scale, zero_point], quantizer.x, "dequantized")
        return _with_axis(node, quantizer.axis)

    def _replace(self, quantizer: FakeQuantize, nodes: list[ir.Node]) -> None:
        ir.convenience.replace_nodes_and_values(
            self._graph, quantizer.node, [quantizer.node], nodes, [quantizer.output], [nodes[-1].outputs[0]]
        )

    def _node(self, op_type: str, inputs: list[ir.Value], like: ir.Value, label: str) -> ir.Node:
        """A node whose output is named after `like` and has its type and shape."""
        name = self._names.take(f"{like.name}_{label}")
        output = ir.Value(name=name, shape=like.shape, type=like.type)
        return ir.node(op_type, inputs, outputs=[output], name=self._names.take(f"{name}_{op_type}"))

    def _integer(self, number: int, dtype: np.dtype[np.integer]) -> ir.Value:
        if (number, dtype) not in self._integers:
            name = f"{dtype.name}_{number}".replace("-", "minus_")
            self._integers[number, dtype] = self._constant(name, np.array(number, dtype))
        return self._integers[number, dtype]

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return add_initializer(self._graph, self._names.take(name), array)


def _storage(quantizer: FakeQuantize) -> np.dtype[np.integer]:
    """The integer type of the pair: that of the zero point."""
    return initializer_array(quantizer.zero_point).dtype


def _saturates(quantizer: FakeQuantize) -> bool:
    """Whether the range is narrower than its type, and the values do not lie in it already."""
    info = np.iinfo(_storage(quantizer))
    return not quantizer.on_grid and (quantizer.range.qmin, quantizer.range.qmax) != (info.min, info.max)


def _is_signed_activation(quantizer: FakeQuantize) -> bool:
    return not is_constant(quantizer.x) and quantizer.axis is None and _storage(quantizer) == np.int8


def _with_axis(node: ir.Node, axis: int | None) -> ir.Node:
    if axis is not None:
        node.attributes["axis"] = ir.AttrInt64("axis", axis)
    return node


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise ValueError(f"a per-channel quantizer on {value.name!r}, whose rank is not known")
    return len(value.shape)
