"""Lowering: FakeQuantize nodes become QuantizeLinear/DequantizeLinear pairs of opset 13..18.

Ranges of more than 8 bits have no integer type there. "before" spells them out, in standard operators,

    y = (clip(round(x / s) + z, qmin, qmax) - z) * s            without z where it is 0

and "between" uses com.microsoft's 16-bit pairs, which onnxruntime has for any opset. For training,
per-channel quantizers are spelled out as well: QuantizeLinear takes 20 times as long on the last axis (of
MatMul weights), on the others as long as all that, and the gradient reads x / s too. The form is the faster

    y = round(clip(x / s, qmin - z, qmax - z)) * s              the bounds are integers: round comes second

where round(c) is (c + 1.5 * 2^23) - 1.5 * 2^23 in float32, exact and to even up to 2^22: on [384, 1536] 0.23
ms with two threads against 0.57 for onnxruntime's Round.

Where the quantizer's range is narrower than its integer type (fewer bits, narrow range), something must
saturate:

* "before": the float tensor is clipped to [(qmin - z) * s, (qmax - z) * s]. Standard everywhere, and the
  bounds are computed in the graph, from the scale, because scales are trained.
* "between": the integers are clipped. onnxruntime then still finds its integer kernels, while a float Clip
  keeps the operator before it in float. Signed activations are written in uint8, 128 higher, which changes
  nothing else: onnxruntime's x86 kernels are for unsigned activations, and it converts signed pairs itself
  only where nothing stands in between, and not before every operator.

Biases become Round(bias / step) * step with step = s_x * s_w. A gate becomes a Where that chooses between the
quantized and the float tensor. Zero points that are computed (float32) are cast to the integer type.

Both give exactly `quantization.quantize` and `dequantize`. Tensors that are on the grid already need no
saturation.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fake_quantize import (
    FakeQuantize,
    is_fake_quantize,
    is_fake_quantize_bias,
    is_learned_scale,
    is_straight_through_round,
    read,
    read_bias,
)
from rewriter.initializers import add_initializer, constant_array, initializer_array
from rewriter.names import FreeNames
from rewriter.operators import MICROSOFT, is_constant

Saturation = Literal["before", "between"]

_SHIFTER: Final = 1.5 * 2**23  # float32 numbers of this size are the integers


def lower(model: ir.Model, *, saturation: Saturation, for_training: bool = False) -> None:
    """Replace every FakeQuantize of the graph by a Q/DQ pair, and every FakeQuantizeBias, in place.

    Scales and zero points may be initializers or computed; "between" takes initializers only.

    Args:
        for_training: the graph is only run, by onnxruntime; pairs that are slow there need not be pairs.
    """
    nodes = [node for node in model.graph if is_fake_quantize(node)]
    zero_points = [read(node).zero_point for node in nodes]
    lowering = _Lowering(model)
    for node in list(model.graph):
        if is_fake_quantize_bias(node):
            lowering.round_bias(node)
        elif is_straight_through_round(node):
            lowering.round(node)
        elif is_learned_scale(node):
            lowering.learned_scale(node)
    for node in nodes:
        quantizer = read(node)  # anew: its input may be the output of one that is lowered now
        if saturation == "between":
            lowering.saturate_between(quantizer)
        elif quantizer.steps or (for_training and (_is_wide(quantizer) or quantizer.axis is not None)):
            lowering.spell_out_for_training(quantizer)
        elif _is_wide(quantizer):
            lowering.spell_out(quantizer)
        else:
            lowering.saturate_before(quantizer)
    for zero_point in zero_points:
        if zero_point.is_initializer() and not zero_point.uses():  # replaced by a shifted one, or not needed
            model.graph.initializers.pop(zero_point.name or "", None)


class _Lowering:
    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(model)
        # What quantizers share: bounds of one scale, integer constants of the whole graph.
        self._bounds: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        self._integers: dict[tuple[int, np.dtype[np.integer]], ir.Value] = {}
        self._numbers: dict[float, ir.Value] = {}
        self._shifted: dict[ir.Value, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._shifters: dict[tuple[int, ...], ir.Value] = {}

    def saturate_before(self, quantizer: FakeQuantize) -> None:
        x, nodes = quantizer.x, []
        if _saturates(quantizer):
            low, high = self._float_bounds(quantizer)
            nodes = self._clipped(quantizer, x, low, high)
            x = nodes[-1].outputs[0]
        zero_point = self._as_type(quantizer, ir.DataType.from_numpy(quantizer.range.dtype))
        quantize = self._quantize(quantizer, x, zero_point)
        dequantize = self._dequantize(quantizer, quantize.outputs[0], zero_point)
        self._replace(quantizer, [*nodes, quantize, dequantize])

    def spell_out(self, quantizer: FakeQuantize) -> None:
        """What `normalize.spelled_out` reads, with the zero point as it is in the model."""
        x, range_ = quantizer.x, quantizer.range
        scale = self._broadcasting(quantizer, quantizer.scale)
        zero_point = None
        if not _is_zero(quantizer.zero_point):
            zero_point = self._broadcasting(quantizer, self._as_type(quantizer, ir.DataType.FLOAT))
        nodes = [self._node("Div", [x, scale], x, "steps")]
        nodes.append(self._node("Round", [nodes[-1].outputs[0]], x, "rounded"))
        if zero_point is not None:
            nodes.append(self._node("Add", [nodes[-1].outputs[0], zero_point], x, "shifted"))
        bounds = [self._number(float(bound)) for bound in (range_.qmin, range_.qmax)]
        nodes.append(self._node("Clip", [nodes[-1].outputs[0], *bounds], x, "quantized"))
        if zero_point is not None:
            nodes.append(self._node("Sub", [nodes[-1].outputs[0], zero_point], x, "shifted_back"))
        nodes.append(self._node("Mul", [nodes[-1].outputs[0], scale], x, "dequantized"))
        self._replace(quantizer, nodes)

    def spell_out_for_training(self, quantizer: FakeQuantize) -> None:
        x = quantizer.x
        scale = self._broadcasting(quantizer, quantizer.scale)
        low = self._steps(quantizer, quantizer.range.qmin, "low")
        high = self._steps(quantizer, quantizer.range.qmax, "high")
        steps = self._node("Div", [x, scale], x, "steps")
        nodes = [steps, *self._clipped(quantizer, steps.outputs[0], low, high)]
        shifter = self._shifter(x)
        for op_type, label in (("Add", "shifted"), ("Sub", "quantized")):
            nodes.append(self._node(op_type, [nodes[-1].outputs[0], shifter], x, label))
        nodes.append(self._node("Mul", [nodes[-1].outputs[0], scale], x, "dequantized"))
        if quantizer.steps is not None:
            quantizer.steps.replace_all_uses_with(steps.outputs[0])
        self._replace(quantizer, nodes)

    def saturate_between(self, quantizer: FakeQuantize) -> None:
        if _is_wide(quantizer):
            self._wide_pair(quantizer)
            return
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

    def _wide_pair(self, quantizer: FakeQuantize) -> None:
        """Saturated in float: onnxruntime has no Clip of 16-bit integers, and no integer kernels to lose."""
        nodes, x = [], quantizer.x
        if _saturates(quantizer):
            low, high = self._float_bounds(quantizer)
            nodes = self._clipped(quantizer, x, low, high)
            x = nodes[-1].outputs[0]
        quantize = self._quantize(quantizer, x, quantizer.zero_point)
        dequantize = self._dequantize(quantizer, quantize.outputs[0], quantizer.zero_point)
        for node in (quantize, dequantize):
            node.domain = MICROSOFT
        self._graph.opset_imports.setdefault(MICROSOFT, 1)
        self._replace(quantizer, [*nodes, quantize, dequantize])

    def round(self, node: ir.Node) -> None:
        x = node.inputs[0]
        assert x is not None
        rounded = self._node("Round", [x], x, "rounded")
        ir.convenience.replace_nodes_and_values(
            self._graph, node, [node], [rounded], [node.outputs[0]], [rounded.outputs[0]]
        )

    def learned_scale(self, node: ir.Node) -> None:
        initial, parameter = node.inputs
        assert initial is not None
        assert parameter is not None
        exponential = self._node("Exp", [parameter], parameter, "exponential")
        product = self._node("Mul", [initial, exponential.outputs[0]], parameter, "product")
        ir.convenience.replace_nodes_and_values(  # passes the name of the scale on
            self._graph, node, [node], [exponential, product], [node.outputs[0]], [product.outputs[0]]
        )

    def round_bias(self, node: ir.Node) -> None:
        """Round and the two products are all that int32 does to a bias: it is never out of range."""
        bias = read_bias(node)
        step = self._node("Mul", [bias.x_scale, bias.weight_scale], bias.weight_scale, "bias_step")
        quotient = self._node("Div", [bias.bias, step.outputs[0]], bias.bias, "steps")
        rounded = self._node("Round", [quotient.outputs[0]], bias.bias, "rounded_steps")
        product = self._node("Mul", [rounded.outputs[0], step.outputs[0]], bias.bias, "rounded")
        nodes = self._gated([step, quotient, rounded, product], bias.gate, bias.bias)
        ir.convenience.replace_nodes_and_values(
            self._graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]]
        )

    def _gated(self, nodes: list[ir.Node], gate: ir.Value | None, x: ir.Value) -> list[ir.Node]:
        """The nodes, and where there is a gate one that chooses between their result and `x`."""
        if gate is None:
            return nodes
        return [*nodes, self._node("Where", [gate, nodes[-1].outputs[0], x], x, "gated")]

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
        scale = self._broadcasting(quantizer, quantizer.scale)
        product = self._node("Mul", [scale, self._steps(quantizer, bound, label)], quantizer.scale, label)
        product.outputs[0].shape = scale.shape
        self._graph.insert_before(quantizer.node, product)
        return product.outputs[0]

    def _steps(self, quantizer: FakeQuantize, bound: int, label: str) -> ir.Value:
        """bound - z, of shape [] where one z is that of all channels, or broadcasting along the axis."""
        zero_point = constant_array(quantizer.zero_point)
        if zero_point is None:
            shift = self._broadcasting(quantizer, self._as_type(quantizer, ir.DataType.FLOAT))
            difference = self._node("Sub", [self._number(float(bound)), shift], shift, f"{label}_steps")
            self._graph.insert_before(quantizer.node, difference)
            return difference.outputs[0]
        steps = bound - zero_point.astype(np.int64)
        if np.all(steps == steps.flat[0]):
            return self._number(float(steps.flat[0]))
        array = steps.astype(np.float32)
        if not _is_on_last_axis(quantizer):
            array = array.reshape(_along(quantizer))
        return self._constant(f"{quantizer.scale.name}_{label}_steps", array)

    def _clipped(self, quantizer: FakeQuantize, x: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Node]:
        """The nodes of clip(x, low, high); the operator Clip takes scalars only."""
        if all(bound.shape is not None and bound.shape.rank() == 0 for bound in (low, high)):
            return [self._node("Clip", [x, low, high], quantizer.x, "clipped")]
        above = self._node("Max", [x, low], quantizer.x, "above_low")
        return [above, self._node("Min", [above.outputs[0], high], quantizer.x, "clipped")]

    def _shifter(self, x: ir.Value) -> ir.Value:
        """`_SHIFTER` in as many dimensions as x: onnxruntime takes 40 times as long to add a scalar where the
        last dimensions are 1, as those of 1x1 convolutions' weights."""
        shape = (1,) * (0 if x.shape is None else len(x.shape))
        if shape not in self._shifters:
            self._shifters[shape] = self._constant("rounding_shifter", np.full(shape, _SHIFTER, np.float32))
        return self._shifters[shape]

    def _broadcasting(self, quantizer: FakeQuantize, parameter: ir.Value) -> ir.Value:
        """The scale or zero point in a shape that broadcasts along the axis of a per-channel quantizer."""
        if quantizer.axis is None or _is_on_last_axis(quantizer):
            return parameter
        target = self._constant(f"{parameter.name}_shape", np.array(_along(quantizer), np.int64))
        reshape = self._node("Reshape", [parameter, target], parameter, "along_axis")
        reshape.outputs[0].shape = None
        self._graph.insert_before(quantizer.node, reshape)
        return reshape.outputs[0]

    def _as_type(self, quantizer: FakeQuantize, dtype: ir.DataType) -> ir.Value:
        """The zero point in another type than the one it has."""
        zero_point = quantizer.zero_point
        if zero_point.dtype == dtype or (
            dtype != ir.DataType.FLOAT and zero_point.dtype != ir.DataType.FLOAT
        ):
            return zero_point
        key = (zero_point, dtype)
        if key not in self._casts:
            cast = self._node("Cast", [zero_point], zero_point, dtype.name.lower())
            cast.attributes["to"] = ir.AttrInt64("to", dtype.value)
            cast.outputs[0].type = ir.TensorType(dtype)
            self._insert_early(cast, zero_point)
            self._casts[key] = cast.outputs[0]
        return self._casts[key]

    def _insert_early(self, node: ir.Node, x: ir.Value) -> None:
        """Behind what makes `x`: later quantizers share the node."""
        producer = x.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)

    def _quantize(self, quantizer: FakeQuantize, x: ir.Value, zero_point: ir.Value) -> ir.Node:
        node = self._node("QuantizeLinear", [x, quantizer.scale, zero_point], quantizer.x, "quantized")
        node.outputs[0].type = ir.TensorType(zero_point.dtype) if zero_point.dtype else None
        return _with_axis(node, quantizer.axis)

    def _dequantize(self, quantizer: FakeQuantize, q: ir.Value, zero_point: ir.Value) -> ir.Node:
        node = self._node("DequantizeLinear", [q, quantizer.scale, zero_point], quantizer.x, "dequantized")
        return _with_axis(node, quantizer.axis)

    def _replace(self, quantizer: FakeQuantize, nodes: list[ir.Node]) -> None:
        nodes = self._gated(nodes, quantizer.gate, quantizer.x)
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

    def _number(self, number: float) -> ir.Value:
        if number not in self._numbers:
            name = f"steps_{number:g}".replace("-", "minus_")
            self._numbers[number] = self._constant(name, np.array(number, np.float32))
        return self._numbers[number]

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return add_initializer(self._graph, self._names.take(name), array)


def _storage(quantizer: FakeQuantize) -> np.dtype[np.integer]:
    """The integer type of the pair: that of the zero point, or where it is computed that of the range."""
    zero_point = constant_array(quantizer.zero_point)
    return quantizer.range.dtype if zero_point is None else zero_point.dtype


def _is_wide(quantizer: FakeQuantize) -> bool:
    return quantizer.range.dtype.itemsize > 1


def _is_on_last_axis(quantizer: FakeQuantize) -> bool:
    if quantizer.axis is None:
        return False
    rank = _rank(quantizer.x)
    return rank > 1 and quantizer.axis % rank == rank - 1


def _is_zero(zero_point: ir.Value) -> bool:
    array = constant_array(zero_point)
    return array is not None and not array.any()


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


def _along(quantizer: FakeQuantize) -> list[int]:
    """The shape that makes a vector broadcast along the quantization axis."""
    assert quantizer.axis is not None
    shape = [1] * _rank(quantizer.x)
    shape[quantizer.axis] = -1
    return shape


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise ValueError(f"a per-channel quantizer on {value.name!r}, whose rank is not known")
    return len(value.shape)
