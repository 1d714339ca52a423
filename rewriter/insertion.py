"""Insertion: carries a placement plan out with FakeQuantize nodes and scale initializers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.bias_quantization import insert_bias_quantizers
from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.quantization import (
    ParametersByQuantizer,
    Plan,
    QuantizedTensor,
    Quantizer,
    QuantizerParameters,
)


def insert(model: ir.Model, plan: Plan, parameters: ParametersByQuantizer) -> None:
    """Put the plan's quantizers into the model, in place.

    Each quantizer gets a scale and a zero point initializer; each of its tensors a FakeQuantize node that the
    planned consumers then read. A quantized graph output keeps its name. Quantizers that the model came with
    keep their nodes and scales, and only gain the consumers and tensors that the plan adds. Biases are then
    rounded as `rewriter.bias_quantization` says.

    Args:
        parameters: for every quantizer that is not `existing`.
    """
    _Insertion(model).run(plan, parameters)
    insert_bias_quantizers(model)


class _Insertion:
    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(model)
        self._values = _values_by_name(model.graph)
        self._order = {node: index for index, node in enumerate(model.graph)}

    def run(self, plan: Plan, parameters: ParametersByQuantizer) -> None:
        for quantizer in plan.quantizers:
            if quantizer.existing:
                scale = self._values[quantizer.scale_name]
                zero_point = self._values[quantizer.zero_point_name]
            else:
                scale, zero_point = self._initializers(quantizer, parameters[quantizer.name])
            for tensor in quantizer.tensors:
                self._quantize(quantizer, tensor, scale, zero_point)

    def _initializers(
        self, quantizer: Quantizer, parameters: QuantizerParameters
    ) -> tuple[ir.Value, ir.Value]:
        shape = parameters.scale.shape
        if len(shape) != (quantizer.axis is not None) or parameters.zero_point.shape != shape:
            raise ValueError(f"the parameters of {quantizer.name!r} have shape {shape}")
        return (
            add_initializer(self._graph, quantizer.scale_name, parameters.scale.astype(np.float32)),
            add_initializer(
                self._graph,
                quantizer.zero_point_name,
                parameters.zero_point.astype(quantizer.range.dtype),
            ),
        )

    def _quantize(
        self, quantizer: Quantizer, tensor: QuantizedTensor, scale: ir.Value, zero_point: ir.Value
    ) -> None:
        x = self._values[tensor.name]
        consumers = set(tensor.consumers)
        uses = [use for use in x.uses() if use.node.name in consumers]
        output = _existing_output(x, scale)
        if output is None:
            node = fake_quantize.make(
                x,
                scale,
                zero_point,
                quantizer.range,
                axis=quantizer.axis,
                on_grid=tensor.on_grid,
                name=self._names.take(f"{x.name}_fake_quantize"),
            )
            output = node.outputs[0]
            output.name = self._names.take(output.name or "")
            self._place(node, x, [use.node for use in uses])
        for use in uses:
            use.node.replace_input_with(use.idx, output)
        if tensor.graph_output and x.is_graph_output():
            self._swap_graph_output(x, output)

    def _place(self, node: ir.Node, x: ir.Value, readers: list[ir.Node]) -> None:
        """Behind the producer; without one, before the first reader, so that the text reads well."""
        producer = x.producer()
        if producer is not None:
            self._graph.insert_after(producer, node)
        elif readers and all(reader in self._order for reader in readers):
            self._graph.insert_before(min(readers, key=self._order.__getitem__), node)
        else:
            self._graph.insert_before(self._graph[0], node)

    def _swap_graph_output(self, x: ir.Value, output: ir.Value) -> None:
        name = x.name
        x.name = self._names.take(f"{name}_float")
        output.name = name
        for index, value in enumerate(self._graph.outputs):
            if value is x:
                self._graph.outputs[index] = output


def _existing_output(x: ir.Value, scale: ir.Value) -> ir.Value | None:
    """The tensor already quantized with this scale."""
    for use in x.uses():
        if fake_quantize.is_fake_quantize(use.node) and fake_quantize.read(use.node).scale is scale:
            return use.node.outputs[0]
    return None


def _values_by_name(graph: ir.Graph) -> Mapping[str, ir.Value]:
    values = {value.name or "": value for value in (*graph.inputs, *graph.initializers.values())}
    values.update({output.name or "": output for node in graph for output in node.outputs})
    return values
