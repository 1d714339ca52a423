"""Raises QuantizeLinear/DequantizeLinear pairs that a model came with to FakeQuantize nodes.

Placement sees them as quantizers that exist, and does not stack a second layer on them.

Rules:

1. Q -> DQ with equal, constant scale, zero point and axis becomes one FakeQuantize. The scale must be
   positive float32, the integers int8 or uint8. A Q without zero point is uint8 with zero point 0.
2. A saturation that belongs to the pair becomes its integer range: a Clip of the integers in between, or a
   float Clip (per channel Max and Min) before whose bounds lie on the grid. A pair without one on data that
   was only moved since it was quantized with the same scale is `on_grid`, and has the range of that.
3. DQ of constant int8 or uint8 becomes a float32 initializer of the dequantized values and a FakeQuantize of
   it; the range is narrow (-127..127) where the values are. DQ of constant int32 (a bias) becomes the float
   initializer alone.
4. Pairs that read the same scale initializer share a quantizer. Its initializers are called `{name}_scale`
   and `{name}_zero_point`; those with such names keep them, others are named after the first tensor.
5. Biases rounded as `rewriter.bias_quantization` lowers it are the biases themselves again.
6. A quantizer of more than 8 bits, spelled out as `rewriter.lowering` does it, becomes a FakeQuantize too.
7. Pairs with scales that are computed, or with other integer types, are left as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.bias_quantization import raise_bias_quantizers, rounding_of_biases
from rewriter.initializers import add_initializer, constant_array
from rewriter.names import FreeNames
from rewriter.normalize.quantization_grid import (
    Grid,
    float_saturation,
    integer_bounds,
    optional_input,
    read_grid,
)
from rewriter.normalize.spelled_out import SpelledOut, read_spelled_out
from rewriter.operators import is_operator, movement_inputs, traits_of
from rewriter.quantization import IntegerRange, dequantize

_Array = npt.NDArray[Any]

_STORED_AS = {
    ir.DataType.INT8: IntegerRange(-128, 127),
    ir.DataType.UINT8: IntegerRange(0, 255),
}


def quantizer_arithmetic(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that a quantizer of a constant consists of: its saturation (rule 2), its rounding (rule 5).

    Evaluated, they would leave a weight that is clipped and a range that is lost.
    """
    nodes = rounding_of_biases(graph)
    for node in graph:
        if (spelled_out := read_spelled_out(node)) is not None:
            nodes.update(spelled_out.nodes)
        if not is_operator(node, "QuantizeLinear"):
            continue
        grid, x = read_grid(node), node.inputs[0]
        if grid is None or x is None:
            continue
        source, range_ = float_saturation(x, grid)
        while range_ is not None and x is not source and (producer := x.producer()) is not None:
            nodes.add(producer)
            first = producer.inputs[0]
            assert first is not None
            x = first
    return nodes


class RaiseQuantizePairs(ir.passes.InPlacePass):
    """Carries the rules of this module out."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raising = _Raising(model)
        for node in list(model.graph):
            if is_operator(node, "DequantizeLinear"):
                raising.find(node)
            elif (spelled_out := read_spelled_out(node)) is not None:
                raising.take(node, spelled_out)
        modified = raising.carry_out()
        return ir.passes.PassResult(model, modified=raise_bias_quantizers(model) > 0 or modified)


@dataclasses.dataclass
class _Found:
    """A pair (or a constant's DQ) that becomes a FakeQuantize of `x`."""

    x: ir.Value
    dequantize: ir.Node
    grid: Grid
    range: IntegerRange
    saturated: bool
    on_grid: bool = False
    wide: SpelledOut | None = None

    @property
    def scale(self) -> ir.Value | None:
        return self.dequantize.inputs[1]

    @property
    def zero_point(self) -> ir.Value | None:
        return optional_input(self.dequantize, 2) if self.wide is None else self.wide.zero_point

    @property
    def key(self) -> tuple[object, ...]:
        """What pairs share that share a quantizer, up to their ranges."""
        return _key(self.dequantize) if self.wide is None else (self.scale, self.zero_point, None)


class _Raising:
    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(model)
        self._found: list[_Found] = []
        self._biases: list[tuple[ir.Node, _Array]] = []
        self._floats: dict[tuple[object, ...], ir.Value] = {}
        self._parameters: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        self._outputs: dict[tuple[object, ...], ir.Value] = {}

    def find(self, node: ir.Node) -> None:
        grid = read_grid(node)
        integers = node.inputs[0]
        if grid is None or integers is None:
            return
        constant = constant_array(integers)
        if constant is not None:
            self._find_constant(node, constant, grid)
            return
        producer, clip_range = integers.producer(), None
        if producer is not None and is_operator(producer, "Clip"):
            clip_range = integer_bounds(producer)
            integers = producer.inputs[0]
            producer = None if integers is None or clip_range is None else integers.producer()
        if producer is None or not is_operator(producer, "QuantizeLinear"):
            return
        quantize_grid = read_grid(producer)
        x = producer.inputs[0]
        if quantize_grid is None or x is None or not quantize_grid.equals(grid):
            return
        if x.dtype not in (None, ir.DataType.FLOAT):
            return
        range_ = clip_range
        if range_ is None:
            x, range_ = float_saturation(x, grid)
        stored = _STORED_AS[ir.DataType.from_numpy(grid.zero_point.dtype)]
        on_grid = range_ is None and _is_moved(x, _key(node))
        self._found.append(_Found(x, node, grid, range_ or stored, range_ is not None, on_grid))

    def take(self, node: ir.Node, found: SpelledOut) -> None:
        self._found.append(_Found(found.x, node, found.grid, found.range, saturated=True, wide=found))

    def _find_constant(self, node: ir.Node, integers: _Array, grid: Grid) -> None:
        values = dequantize(integers, grid.scale, grid.zero_point, grid.axis)
        if integers.dtype == np.int32:
            self._biases.append((node, values))
            return
        if integers.dtype not in (np.int8, np.uint8):
            return
        range_ = _STORED_AS[ir.DataType.from_numpy(integers.dtype)]
        if integers.dtype == np.int8 and (integers.size == 0 or integers.min() > -128):
            range_ = IntegerRange.for_weights(8)
        x = self._float_initializer(node, values)
        self._found.append(_Found(x, node, grid, range_, saturated=True))

    def carry_out(self) -> bool:
        narrow = {found.key: found.range for found in self._found if found.saturated}
        for found in self._found:
            if found.on_grid:
                found.range = narrow.get(found.key, found.range)
            self._replace(found)
        for node, values in self._biases:
            self._take_over(node, self._float_initializer(node, values))
        return bool(self._found or self._biases)

    def _replace(self, found: _Found) -> None:
        # Each graph output needs a value of its own.
        output = found.dequantize.outputs[0] if found.dequantize.outputs[0].is_graph_output() else None
        key = (found.x, found.key, found.range, output)
        if key not in self._outputs:
            scale, zero_point = self._initializers(found)
            node = fake_quantize.make(
                found.x,
                scale,
                zero_point,
                found.range,
                axis=found.grid.axis,
                on_grid=found.on_grid,
                name=self._names.take(f"{found.x.name}_fake_quantize"),
            )
            self._outputs[key] = node.outputs[0]
            node.outputs[0].name = self._names.take(node.outputs[0].name or "")
            self._insert(node, found)
        self._take_over(found.dequantize, self._outputs[key])

    def _insert(self, node: ir.Node, found: _Found) -> None:
        producer = found.x.producer()
        if producer is None:
            first = next(iter(self._graph)) if found.x.is_initializer() else found.dequantize
            self._graph.insert_before(first, node)
        else:
            self._graph.insert_after(producer, node)

    def _initializers(self, found: _Found) -> tuple[ir.Value, ir.Value]:
        """Rule 4."""
        key = (found.key, found.range)
        if key not in self._parameters:
            scale, zero_point = found.scale, found.zero_point
            stem = (scale.name or "").removesuffix("_scale") if scale is not None else ""
            if found.wide is not None and zero_point is None and self._names.is_free(f"{stem}_zero_point"):
                name = self._names.take(f"{stem}_zero_point")
                zero_point = add_initializer(self._graph, name, found.grid.zero_point)
            if not (
                scale is not None
                and zero_point is not None
                and scale.name == f"{stem}_scale"
                and zero_point.name == f"{stem}_zero_point"
                and scale.shape == found.grid.scale.shape
                and all(scale is not used for used, _ in self._parameters.values())
            ):
                stem = self._names.take_stem(found.x.name or "", ("_scale", "_zero_point"))
                scale = add_initializer(self._graph, f"{stem}_scale", found.grid.scale)
                zero_point = add_initializer(self._graph, f"{stem}_zero_point", found.grid.zero_point)
            self._parameters[key] = scale, zero_point
        return self._parameters[key]

    def _float_initializer(self, node: ir.Node, values: _Array) -> ir.Value:
        """Dequantized values; a constant that several DQ read alike is stored once."""
        integers = node.inputs[0]
        assert integers is not None
        key = (integers, _key(node))
        if key not in self._floats:
            name = self._names.take(f"{integers.name}_float")
            self._floats[key] = add_initializer(self._graph, name, values.astype(np.float32))
        return self._floats[key]

    def _take_over(self, old: ir.Node, value: ir.Value) -> None:
        output = old.outputs[0]
        if output.is_graph_output():
            name = output.name
            output.replace_all_uses_with(value, replace_graph_outputs=True)
            output.name = None
            value.name = name
        else:
            output.replace_all_uses_with(value)
        self._drop(old)

    def _drop(self, node: ir.Node) -> None:
        """Remove a node that nothing reads, and what only it read."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
                continue
            inputs = [value for value in node.inputs if value is not None]
            self._graph.remove(node, safe=True)
            for value in inputs:
                if (producer := value.producer()) is not None:
                    pending.append(producer)
                elif value.is_initializer() and not value.uses() and not value.is_graph_output():
                    self._graph.initializers.pop(value.name or "", None)


def _key(dequantize: ir.Node) -> tuple[object, ...]:
    axis = dequantize.attributes.get_int("axis", 1)
    return dequantize.inputs[1], optional_input(dequantize, 2), axis


def _is_moved(x: ir.Value, key: tuple[object, ...]) -> bool:
    """Whether `x` is only a rearrangement of tensors that were quantized with the same scale."""
    node = x.producer()
    traits = None if node is None else traits_of(node)
    if node is None or traits is None or traits.kind != "movement" or not traits.only_moves(node):
        return False
    makers = [value.producer() for value in movement_inputs(node, traits)]
    return all(
        maker is not None and is_operator(maker, "DequantizeLinear") and _key(maker) == key
        for maker in makers
    )
