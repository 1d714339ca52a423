"""Carries out the folding of single batch norms; `rewriter.fold.batch_norm` has the rules."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fold.matching import BatchNormPair, bias_of
from rewriter.fold.report import BatchNormTensors, TrainingFold
from rewriter.initializers import add_initializer, float64_array, initializer_array
from rewriter.names import FreeNames, reserve_names

_Float64 = npt.NDArray[np.float64]


def tensors_of(batch_norm: ir.Node) -> BatchNormTensors:
    return BatchNormTensors(*(value.name or "" for value in batch_norm.inputs[1:5] if value is not None))


@dataclasses.dataclass(frozen=True)
class _Result:
    """The value in place of the batch norm's result, what makes it, and the node that adds the bias."""

    output: ir.Value
    weight: ir.Value
    bias: ir.Value
    add: str | None


class Folding:
    """Merges batch norms of one model into the layers before them."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(model)
        # Rule 4: folded weights by what they are made from.
        self._weights: dict[tuple[object, ...], ir.Value] = {}
        self._replaced: dict[ir.Value, list[ir.Value]] = {}
        # Weights and biases of layers that are folded in training: what is folded of them has its own name.
        self._trained: set[ir.Value] = set()

    def fold(self, pair: BatchNormPair) -> ir.Value:
        """Returns the value that takes the place of the batch norm's result."""
        return self._fold(pair, shared_with=()).output

    def fold_for_training(
        self, pair: BatchNormPair, freeze_bn_delay: int | None
    ) -> tuple[ir.Value, TrainingFold]:
        """The same, and how the training graph computes weight and bias."""
        weight, attributes = pair.weight, pair.batch_norm.attributes
        tensors, bias = tensors_of(pair.batch_norm), bias_of(pair.layer)
        original, original_name = weight.value.const_value, weight.value.name or ""
        assert original is not None
        values = [initializer_array(value) for value in pair.batch_norm.inputs[1:5]]
        if bias is not None:  # before the freeze it cancels: the running mean takes it in
            scale = pair.layer.attributes.get_float("beta", 1.0) if pair.layer.op_type == "Gemm" else 1.0
            values[2] = (values[2] - scale * _rows(float64_array(bias))).astype(np.float32)
            self._trained.add(bias)
        group = pair.layer.attributes.get_int("group", 1) if pair.layer.op_type == "ConvTranspose" else 1
        self._trained.add(weight.value)
        # The training graph gets them back.
        reserve_names(self._graph, [*dataclasses.astuple(tensors), original_name])
        result = self._fold(pair, shared_with=tuple(pair.batch_norm.inputs[1:5]))
        return result.output, TrainingFold(
            weight=result.weight.name or "",
            bias=result.bias.name or "",
            original=original,
            original_name=original_name,
            tensors=tensors,
            values=tuple(values),
            epsilon=attributes.get_float("epsilon", 1e-5),
            momentum=attributes.get_float("momentum", 0.9),
            weight_index=weight.index,
            channel_axis=weight.axis,
            group=group,
            add=result.add,
            freeze_bn_delay=freeze_bn_delay,
        )

    def _fold(self, pair: BatchNormPair, shared_with: tuple[ir.Value | None, ...]) -> _Result:
        factor, shift = pair.factor_and_shift()
        layer, add = pair.layer, None
        weight = self._folded_weight(pair, factor, shared_with)
        layer.replace_input_with(pair.weight.index, weight)
        if layer.op_type != "MatMul":
            bias, output = self._fold_bias(layer, factor, shift), layer.outputs[0]
        elif pair.weight.index == 1:
            bias, output = self._as_gemm(layer, shift)
        else:
            bias, node = self._with_add(layer, shift)
            add, output = node.name, node.outputs[0]
        self._take_over(pair.batch_norm, output)
        return _Result(output, weight, bias, add)

    def finish(self) -> None:
        """Drop what nothing reads any more; a weight's only replacement gets its name."""
        for original, folded in self._replaced.items():
            if original.uses() or original.is_graph_output():
                continue
            name = original.name or ""
            self._graph.initializers.pop(name)
            if len(folded) == 1 and original not in self._trained:
                folded[0].name = name

    def _folded_weight(
        self, pair: BatchNormPair, factor: _Float64, shared_with: tuple[ir.Value | None, ...]
    ) -> ir.Value:
        weight, layer = pair.weight.value, pair.layer
        group = layer.attributes.get_int("group", 1) if layer.op_type == "ConvTranspose" else 1
        key = (weight, pair.weight.axis, group, factor.tobytes(), shared_with)
        if key not in self._weights:
            array = _scaled(float64_array(weight), factor, pair.weight.axis, group)
            self._weights[key] = self._initializer(f"{weight.name}_folded", array)
            self._replaced.setdefault(weight, []).append(self._weights[key])
        return self._weights[key]

    def _fold_bias(self, layer: ir.Node, factor: _Float64, shift: _Float64) -> ir.Value:
        bias = bias_of(layer)
        values = np.zeros_like(shift) if bias is None else float64_array(bias)
        if layer.op_type == "Gemm":
            values = values * layer.attributes.get_float("beta", 1.0)
            layer.attributes.pop("beta", None)
        folded = self._initializer(f"{layer.name}_bias", _rows(values * factor + shift))
        if bias is None:
            layer.resize_inputs(3)
        else:
            self._replaced.setdefault(bias, []).append(folded)
        layer.replace_input_with(2, folded)
        return folded

    def _as_gemm(self, layer: ir.Node, shift: _Float64) -> tuple[ir.Value, ir.Value]:
        x, weight = layer.inputs
        bias = self._initializer(f"{layer.name}_bias", shift)
        gemm = ir.node("Gemm", [x, weight, bias], name=layer.name)
        old, new = layer.outputs[0], gemm.outputs[0]
        ir.convenience.replace_nodes_and_values(self._graph, layer, [layer], [gemm], [old], [new])
        return bias, new

    def _with_add(self, layer: ir.Node, shift: _Float64) -> tuple[ir.Value, ir.Node]:
        bias = self._initializer(f"{layer.name}_bias", shift[:, np.newaxis])
        x = layer.outputs[0]
        output = ir.Value(name=self._names.take(f"{x.name}_biased"), shape=x.shape, type=x.type)
        add = ir.node("Add", [x, bias], outputs=[output], name=self._names.take(f"{layer.name}_bias_add"))
        self._graph.insert_after(layer, add)
        return bias, add

    def _take_over(self, batch_norm: ir.Node, output: ir.Value) -> None:
        old = batch_norm.outputs[0]
        name = old.name if old.is_graph_output() else output.name
        # The MatMul's Add reads the layer; only the batch norm's own readers move.
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        parameters = batch_norm.inputs[1:5]
        self._graph.remove(batch_norm, safe=True)
        output.name = name
        for value in parameters:
            if value is not None and not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(value.name or "", None)

    def _initializer(self, name: str, array: _Float64) -> ir.Value:
        return add_initializer(self._graph, self._names.take(name), array.astype(np.float32))


def _scaled(weight: _Float64, factor: _Float64, axis: int | None, group: int) -> _Float64:
    """The weight with each output channel times its factor."""
    if group > 1:
        # A grouped ConvTranspose: [C_in, C_out / group, ...]; group g of C_in makes group g of C_out.
        grouped = weight.reshape(group, -1, *weight.shape[1:])
        factors = factor.reshape(group, 1, -1, *[1] * (weight.ndim - 2))
        product: _Float64 = (grouped * factors).reshape(weight.shape)
        return product
    assert axis is not None
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factor.reshape(shape)


def _rows(bias: _Float64) -> _Float64:
    """A Gemm's bias of shape [1, N] as [N]."""
    return bias[0] if bias.ndim == 2 and bias.shape[0] == 1 else bias
