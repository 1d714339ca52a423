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
   "keep" every one does. Where the rank of its input is not known it does not train, and is folded once.
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
from rewriter.fold.folding import Folding, tensors_of
from rewriter.fold.matching import BatchNormPair, Left, match_batch_norms, why_not_affine
from rewriter.fold.report import Folded, FoldReport, Trained
from rewriter.initializers import add_initializer, initializer_array
from rewriter.names import FreeNames
from rewriter.operators import is_operator
from rewriter.placement.settings import NodeSettings, in_scope, settings_for_unit
from rewriter.recipe import Recipe

_Float64 = npt.NDArray[np.float64]


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
    in_training = [
        pair
        for pair in folds
        if decided[pair.batch_norm].settings.batch_norm == "fold_training" and _has_rank(pair.batch_norm)
    ]
    _separate_tensors([*trained, *(pair.batch_norm for pair in in_training)], model)

    folding = Folding(model)
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
            Trained(node.name or "", reason, tensors_of(node), _settings(node, recipe).freeze_bn_delay)
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
        and _has_rank(node)
    )


def _has_rank(batch_norm: ir.Node) -> bool:
    """Statistics of the batch are taken over all axes but one: these must be known."""
    x = batch_norm.inputs[0]
    return x is not None and x.shape is not None


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


def _float64(value: ir.Value | None) -> _Float64:
    return initializer_array(value).astype(np.float64)
