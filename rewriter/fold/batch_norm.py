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
   training they share it only if they are one module that is called twice: they read one weight, and their
   batch norms the same four tensors. Other batch norms that share tensors get copies: exporters merge equal
   constants.
5. What cannot be folded stays, with the reason; with "fold_training" it trains as a batch norm, and with
   "keep" every one does. Where the rank of its input is not known, or it is not float32, it does not train,
   and is folded once if it can be.
6. Batch norms outside the recipe's scope are left as they are. (tf.contrib.quantize folded them all.) One
   that was exported in training mode is one in inference mode where it trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fold.channel_scale import merge_channel_scales
from rewriter.fold.folding import Folding, tensors_of
from rewriter.fold.matching import BatchNormPair, Left, match_batch_norms, why_not_affine
from rewriter.fold.report import Folded, FoldReport, TrainedBatchNorm
from rewriter.initializers import add_initializer, float64_array, initializer_array
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
    in_training_mode = [node for node in batch_norms if node.attributes.get_int("training_mode", 0)]
    for node in in_training_mode:
        if in_scope(node, recipe):
            _to_inference_mode(node)
    merge_channel_scales(model, [node for node in batch_norms if in_scope(node, recipe)])
    pairs, unmatched = match_batch_norms(model)
    matches = {pair.batch_norm: pair for pair in pairs}
    reasons = {one.node: one.reason for one in unmatched}
    decisions = {
        node: _decide(node, matches.get(node), reasons.get(node.name or ""), model.graph, recipe)
        for node in batch_norms
    }
    _separate_tensors(
        {
            node: node if (pair := matches.get(node)) is None else pair.weight.value
            for node, decision in decisions.items()
            if decision.treatment in ("fold in training", "train")
        },
        model,
    )
    statistics = _statistics(model.graph)
    tensors = {node: tensors_of(node) for node in batch_norms if decisions[node].treatment == "train"}
    folding = Folding(model)
    folded, outputs = [], {}
    for node, decision in decisions.items():
        if decision.treatment in ("fold once", "fold in training"):
            pair = matches[node]
            name, layer, training = node.name or "", pair.layer, None
            if decision.treatment == "fold once":
                outputs[node] = folding.fold(pair)
            else:
                outputs[node], training = folding.fold_for_training(pair, decision.freeze_bn_delay)
            folded.append(Folded(name, layer.name or "", layer.op_type, training))
    folding.finish()
    return FoldReport(
        folded=tuple(folded),
        trained=tuple(
            TrainedBatchNorm(
                node.name or "", decisions[node].reason, tensors[node], decisions[node].freeze_bn_delay
            )
            for node in tensors
        ),
        left=tuple(
            Left(node.name or "", decision.reason)
            for node, decision in decisions.items()
            if decision.treatment == "leave"
        ),
        statistics={
            outputs.get(node, node.outputs[0]).name or "": known for node, known in statistics.items()
        },
        found=len(batch_norms),
        training_mode=tuple(node.name or "" for node in in_training_mode),
        still_in_training_mode=tuple(
            node.name or "" for node in in_training_mode if "training_mode" in node.attributes
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Decision:
    """What becomes of one batch norm. `reason`: why it is not folded."""

    treatment: Literal["fold in training", "fold once", "train", "leave"]
    reason: str
    freeze_bn_delay: int | None


def _decide(
    node: ir.Node, pair: BatchNormPair | None, unmatched: str | None, graph: ir.Graph, recipe: Recipe
) -> _Decision:
    """`unmatched`: why no layer can take the batch norm in; then there is no pair."""
    settings = _settings(node, recipe)
    delay, mode = settings.freeze_bn_delay, settings.batch_norm
    if not in_scope(node, recipe):
        return _Decision("leave", _outside(recipe), delay)
    reason, obstacle = unmatched, _why_not_trained(node, graph)
    if pair is not None and not in_scope(pair.layer, recipe):
        reason = f"the layer before it is {_outside(recipe)}"
    elif pair is not None and mode == "keep":
        reason = "the recipe keeps it"
    if reason is None:
        in_training = mode == "fold_training" and obstacle is None
        return _Decision("fold in training" if in_training else "fold once", "", delay)
    if mode != "fold_inference" and obstacle is None:
        return _Decision("train", reason, delay)
    return _Decision("leave", reason if mode == "fold_inference" else f"{reason}; {obstacle}", delay)


def _why_not_trained(node: ir.Node, graph: ir.Graph) -> str | None:
    """Why the batch norm cannot normalize with the statistics of the batch in training."""
    x = node.inputs[0]
    if (reason := why_not_affine(node, graph)) is not None:
        return reason
    if x is None or x.shape is None:
        return "the rank of its input is not known, so that it does not train"
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs[:5]):
        return "it is not float32 throughout, so that it does not train"
    return None


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


def _separate_tensors(modules: Mapping[ir.Node, object], model: ir.Model) -> None:
    """Rule 4: copies for a module's batch norm of tensors that others, or it itself, read in another place.

    Args:
        modules: batch norms that train, and what tells the module that each is a call of.
    """
    names = FreeNames(model)
    keys = {node: (module, *node.inputs[1:5]) for node, module in modules.items()}
    copies: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}
    for node, key in keys.items():
        tensors = [value for value in node.inputs[1:5] if value is not None]
        if key not in copies:
            copies[key] = tuple(
                value
                if _is_own(value, index, key, keys)
                else add_initializer(
                    model.graph, names.take(f"{node.name}.{_ROLES[index]}"), initializer_array(value).copy()
                )
                for index, value in enumerate(tensors, 1)
            )
    for node, key in keys.items():
        tensors = [value for value in node.inputs[1:5] if value is not None]
        for index, value in enumerate(copies[key], 1):
            node.replace_input_with(index, value)
        for value in tensors:
            if not value.uses() and not value.is_graph_output():
                model.graph.initializers.pop(value.name or "", None)


_ROLES: Final = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}


def _is_own(
    value: ir.Value, index: int, key: tuple[object, ...], keys: Mapping[ir.Node, tuple[object, ...]]
) -> bool:
    """Whether only calls of one module read the value, and all in this place."""
    return not value.is_graph_output() and all(
        use.idx == index and keys.get(use.node) == key for use in value.uses()
    )


def _statistics(graph: ir.Graph) -> dict[ir.Node, tuple[_Float64, _Float64]]:
    """Beta and |gamma| of every batch norm that is an affine function with known constants."""
    return {
        node: (float64_array(node.inputs[2]), np.abs(float64_array(node.inputs[1])))
        for node in graph
        if is_operator(node, "BatchNormalization") and why_not_affine(node, graph) is None
    }
