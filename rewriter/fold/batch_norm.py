"""Folds batch normalization into the layer before it.

    BN(u) = gamma * (u - mean) / sqrt(variance + epsilon) + beta = factor * u + shift      per channel
    BN(layer(x, W) + b) = layer(x, factor * W) + factor * b + shift

That is inference with the running statistics, of which the QAT model starts. What is folded for training only
(recipe: batch_norm = "fold_training") leaves a `TrainingFold` behind: the training graph computes weight and
bias from W, gamma, beta and the running statistics anew, and normalizes with the statistics of the batch
(`rewriter.training.batch_norm`).

Rules:

1. The layer is a Conv, ConvTranspose (grouped too), Gemm or MatMul with a constant weight (and bias) whose
   result goes into the batch norm only. Weight and bias are computed in float64 and stored in float32.
2. A MatMul has no place for the shift: a plain matrix product becomes a Gemm, one with its weight on the left
   gets an Add behind it. Axis 1, the channels of a batch norm, must be the axis that the weight produces.
3. A Mul and an Add by per-channel constants behind a batch norm (Caffe's Scale) become part of its gamma and
   beta first, whether it can be folded or not.
4. Layers that share a weight and have the same factors keep sharing it; otherwise each gets its own. In
   training they share it only if they are one module that is called twice: their batch norms read the same
   four tensors. Batch norms that share some of them, as exporters merge equal constants, get copies.
5. What cannot be folded stays, with the reason; with "fold_training" it trains as a batch norm, and with
   "keep" every one does.
6. Batch norms outside the recipe's scope are left as they are. (tf.contrib.quantize folded them all.) One
   that was exported in training mode is one in inference mode where it trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fold.channel_scale import merge_channel_scales
from rewriter.fold.matching import BatchNormPair, Left, bias_of, match_batch_norms, why_not_affine
from rewriter.initializers import add_initializer, initializer_array
from rewriter.names import FreeNames
from rewriter.operators import is_operator
from rewriter.placement.settings import NodeSettings, in_scope, settings_for_unit
from rewriter.quantization import Statistics
from rewriter.recipe import Recipe

_Float64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class BatchNormTensors:
    """What a batch norm is made of, by name; float32, shape [channels]."""

    gamma: str
    beta: str
    running_mean: str
    running_variance: str


@dataclasses.dataclass(frozen=True)
class TrainingFold:
    """How the training graph computes a folded weight and bias.

    Attributes:
        weight, bias: initializers of the folded model: factor * W, and beta - factor * mean.
        original: W, which has its old name.
        values: gamma, beta, running mean (of the layer without its bias) and running variance.
        weight_index: which input of the folded layer the weight is.
        channel_axis, group: where the output channels are in W; see `rewriter.operators`.
        add: the node that adds the bias, None where the layer does.
    """

    weight: str
    bias: str
    original: ir.TensorProtocol
    tensors: BatchNormTensors
    values: tuple[npt.NDArray[np.float32], ...]
    epsilon: float
    momentum: float
    weight_index: int
    channel_axis: int | None
    group: int
    add: str | None
    freeze_bn_delay: int | None


@dataclasses.dataclass(frozen=True)
class Folded:
    """A batch norm that became part of a layer: names of the nodes, operator type of the layer.

    `training`: None where it was folded once and for all.
    """

    batch_norm: str
    layer: str
    op: str
    training: TrainingFold | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A batch norm that stays and trains as one, and why it is not folded."""

    node: str
    reason: str
    tensors: BatchNormTensors
    freeze_bn_delay: int | None


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What folding did, in graph order.

    Attributes:
        found, training_mode: batch norms in the model, and how many of them came in training mode.
        statistics: mean and standard deviation per channel, beta and |gamma|, of what batch norms gave in
            training, folded and left ones; float64, shape [channels], by the name that the tensor has now.
    """

    folded: tuple[Folded, ...] = ()
    trained: tuple[Trained, ...] = ()
    left: tuple[Left, ...] = ()
    statistics: Statistics = dataclasses.field(default_factory=dict)
    found: int = 0
    training_mode: int = 0


def fold_batch_norms(model: ir.Model, recipe: Recipe | None = None) -> FoldReport:
    """Fold the batch norms of a normalized model, in place.

    Args:
        recipe: scope, batch_norm, freeze_bn_delay and overrides are read; None: all that can be are folded
            once and for all.
    """
    recipe = recipe or Recipe(batch_norm="fold_inference")
    batch_norms = [node for node in model.graph.all_nodes() if is_operator(node, "BatchNormalization")]
    training_mode = [node for node in batch_norms if node.attributes.get_int("training_mode", 0)]
    for node in training_mode:
        if in_scope(node, recipe) and _settings(node, recipe).batch_norm != "fold_inference":
            _to_inference_mode(node)
    merge_channel_scales(model, [node for node in batch_norms if in_scope(node, recipe)])
    pairs, left = match_batch_norms(model)
    decided = {pair.batch_norm: _decide(pair, recipe) for pair in pairs}
    stays = {one.node: one.reason for one in left}
    reasons = {node: stays.get(node.name or "") or decided[node].reason for node in batch_norms}
    trained = {
        node: reason
        for node in batch_norms
        if (reason := reasons[node]) is not None and _trains(node, model.graph, recipe)
    }
    folds = [pair for pair in pairs if decided[pair.batch_norm].reason is None]
    in_training = [pair for pair in folds if decided[pair.batch_norm].settings.batch_norm == "fold_training"]
    _separate_tensors([*trained, *(pair.batch_norm for pair in in_training)], model)

    folding = _Folding(model)
    statistics = _statistics(model.graph)
    folded, outputs = [], {}
    for pair in folds:
        name, layer = pair.batch_norm.name or "", pair.layer
        training = None
        if pair in in_training:
            outputs[pair.batch_norm], training = folding.fold_for_training(
                pair, decided[pair.batch_norm].settings.freeze_bn_delay
            )
        else:
            outputs[pair.batch_norm] = folding.fold(pair)
        folded.append(Folded(name, layer.name or "", layer.op_type, training))
    folding.finish()
    return FoldReport(
        folded=tuple(folded),
        trained=tuple(
            Trained(node.name or "", reason, _tensors(node), _settings(node, recipe).freeze_bn_delay)
            for node, reason in trained.items()
        ),
        left=tuple(
            Left(node.name or "", reason)
            for node in batch_norms
            if (reason := reasons[node]) is not None and node not in trained
        ),
        statistics={
            outputs.get(node, node.outputs[0]).name or "": known for node, known in statistics.items()
        },
        found=len(batch_norms),
        training_mode=len(training_mode),
    )


@dataclasses.dataclass(frozen=True)
class _Decision:
    """What the recipe says about a batch norm that can be folded; `reason`: why it is not."""

    settings: NodeSettings
    reason: str | None


def _decide(pair: BatchNormPair, recipe: Recipe) -> _Decision:
    settings = settings_for_unit((pair.batch_norm, pair.layer), recipe)
    if not in_scope(pair.batch_norm, recipe):
        return _Decision(settings, _outside(recipe))
    if not in_scope(pair.layer, recipe):
        return _Decision(settings, f"the layer before it is {_outside(recipe)}")
    return _Decision(settings, "the recipe keeps it" if settings.batch_norm == "keep" else None)


def _trains(node: ir.Node, graph: ir.Graph, recipe: Recipe) -> bool:
    """Whether a batch norm that is not folded normalizes with the statistics of the batch in training."""
    return (
        in_scope(node, recipe)
        and _settings(node, recipe).batch_norm != "fold_inference"
        and why_not_affine(node, graph) is None
    )


def _settings(batch_norm: ir.Node, recipe: Recipe) -> NodeSettings:
    """With the layer before it, if there is one: overrides match one or the other."""
    x = batch_norm.inputs[0]
    layer = None if x is None else x.producer()
    return settings_for_unit((batch_norm,) if layer is None else (batch_norm, layer), recipe)


def _outside(recipe: Recipe) -> str:
    return f"outside the recipe's scope {recipe.scope!r}"


def _to_inference_mode(node: ir.Node) -> None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return
    node.attributes.pop("training_mode")
    node.resize_outputs(1)


def _tensors(batch_norm: ir.Node) -> BatchNormTensors:
    return BatchNormTensors(*(value.name or "" for value in batch_norm.inputs[1:5] if value is not None))


def _separate_tensors(batch_norms: Iterable[ir.Node], model: ir.Model) -> None:
    """Rule 4: copies for a batch norm of tensors that others, or it itself, read in another place."""
    names = FreeNames(model)
    copies: dict[tuple[ir.Value | None, ...], tuple[ir.Value, ...]] = {}
    for node in batch_norms:
        original = tuple(node.inputs[1:5])
        if original not in copies:
            copies[original] = tuple(
                value
                if _is_own(value, index, original)
                else add_initializer(
                    model.graph, names.take(f"{node.name}.{_ROLES[index]}"), initializer_array(value).copy()
                )
                for index, value in enumerate(original, 1)
                if value is not None
            )
        for index, value in enumerate(copies[original], 1):
            node.replace_input_with(index, value)


_ROLES: Final = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}


def _is_own(value: ir.Value, index: int, tensors: tuple[ir.Value | None, ...]) -> bool:
    """Whether only batch norms with all the same tensors read the value, and all in this place."""
    return not value.is_graph_output() and all(
        use.idx == index and tuple(use.node.inputs[1:5]) == tensors for use in value.uses()
    )


def _statistics(graph: ir.Graph) -> dict[ir.Node, tuple[_Float64, _Float64]]:
    """Beta and |gamma| of every batch norm that is an affine function with known constants."""
    return {
        node: (_float64(node.inputs[2]), np.abs(_float64(node.inputs[1])))
        for node in graph
        if is_operator(node, "BatchNormalization") and why_not_affine(node, graph) is None
    }


@dataclasses.dataclass(frozen=True)
class _Result:
    """The value in place of the batch norm's result, what makes it, and the node that adds the bias."""

    output: ir.Value
    weight: ir.Value
    bias: ir.Value
    add: str | None


class _Folding:
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
        tensors, bias = _tensors(pair.batch_norm), bias_of(pair.layer)
        original = weight.value.const_value
        assert original is not None
        values = [initializer_array(value) for value in pair.batch_norm.inputs[1:5]]
        if bias is not None:  # before the freeze it cancels: the running mean takes it in
            scale = pair.layer.attributes.get_float("beta", 1.0) if pair.layer.op_type == "Gemm" else 1.0
            values[2] = (values[2] - scale * _rows(_float64(bias))).astype(np.float32)
            self._trained.add(bias)
        group = pair.layer.attributes.get_int("group", 1) if pair.layer.op_type == "ConvTranspose" else 1
        self._trained.add(weight.value)
        result = self._fold(pair, shared_with=tuple(pair.batch_norm.inputs[1:5]))
        return result.output, TrainingFold(
            weight=result.weight.name or "",
            bias=result.bias.name or "",
            original=original,
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
            array = _scaled(_float64(weight), factor, pair.weight.axis, group)
            self._weights[key] = self._initializer(f"{weight.name}_folded", array)
            self._replaced.setdefault(weight, []).append(self._weights[key])
        return self._weights[key]

    def _fold_bias(self, layer: ir.Node, factor: _Float64, shift: _Float64) -> ir.Value:
        bias = bias_of(layer)
        values = np.zeros_like(shift) if bias is None else _float64(bias)
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


def _float64(value: ir.Value | None) -> _Float64:
    return initializer_array(value).astype(np.float64)
