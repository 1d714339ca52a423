"""The patterns by which tf.contrib.quantize recognized a layer and what follows it.

    layer -> [bias add] -> [bypass Add] -> activation -> [post-activation Add]

A layer with a bias input is its own bias add: the value behind a TensorFlow BiasAdd is its result. A layer
without one has the Add that reads it for a bias add, whatever is added; so a residual Add right behind such a
layer is no bypass. Quantizers that the model came with are no part of a pattern: it is matched past them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.operators import WeightOperand, is_operator, traits_of, unquantized
from rewriter.placement.drafts import readers

Layers = Mapping[ir.Node, WeightOperand]


@dataclasses.dataclass(frozen=True)
class LayerMatch:
    """A layer and the nodes of its pattern.

    Attributes:
        end: the node whose result counts as that of the layer: its activation; without one the bias add, or
            the layer itself.
        bias_add: the layer itself where the bias is an input of it.
        bypass: Add of another branch, between the bias add and the activation.
        post_add: Add that reads the activation.
    """

    layer: ir.Node
    end: ir.Node
    bias_add: ir.Node | None = None
    bypass: ir.Node | None = None
    post_add: ir.Node | None = None

    @property
    def before_bypass(self) -> ir.Node | None:
        """The bias add, where a bypass Add reads it."""
        return None if self.bypass is None else self.bias_add


def find_matches(graph: ir.Graph, layers: Layers) -> list[LayerMatch]:
    """The match of each layer that has one: by the first pattern, and of that the first node in graph order.

    A node is tried as the end of a pattern with one layer only, which makes the original's blind spots: of
    two layers without biases that one Add sums, the second has no match.
    """
    found: dict[ir.Node, LayerMatch] = {}
    for pattern in _PATTERNS:
        for node in graph:
            match = pattern(node, layers)
            if match is not None:
                found.setdefault(match.layer, match)
    return list(found.values())


def is_relu(node: ir.Node) -> bool:
    """Relu and Relu6: Clip to [0, 6]. A Clip to [0, infinity) is a Relu."""
    if is_operator(node, "Relu"):
        return True
    return is_operator(node, "Clip") and _bounds(node) in ((0.0, 6.0), (0.0, None))


def is_layer_operator(node: ir.Node) -> bool:
    """Conv2D, DepthwiseConv2dNative and MatMul of TensorFlow, by operator type and rank alone."""
    if is_operator(node, "Conv", "Gemm"):
        rank = _rank(node, 1)
        return rank == (4 if node.op_type == "Conv" else 2)
    return is_operator(node, "MatMul") and 2 in (_rank(node, 0), _rank(node, 1))


def _activation_then_add(node: ir.Node, layers: Layers) -> LayerMatch | None:
    if not is_operator(node, "Add"):
        return None
    for value in reversed(node.inputs):
        match = _activation(_producer(value), layers)
        if match is not None:
            return dataclasses.replace(match, post_add=node)
    return None


def _activation(node: ir.Node | None, layers: Layers) -> LayerMatch | None:
    if node is None or not (is_relu(node) or is_operator(node, "Identity")) or _is_before_batch_norm(node):
        return None
    before = _producer(node.inputs[0])
    match = _bias_add(before, layers) or _bypass(before, layers) or _layer(before, layers)
    return None if match is None else dataclasses.replace(match, end=node)


def _bypass(node: ir.Node | None, layers: Layers) -> LayerMatch | None:
    if node is None or not is_operator(node, "Add"):
        return None
    matches = (_bias_add(_producer(value), layers) for value in node.inputs)
    match = next((match for match in matches if match is not None), None)
    return None if match is None else dataclasses.replace(match, bypass=node)


def _bias_add(node: ir.Node | None, layers: Layers) -> LayerMatch | None:
    if node is None:
        return None
    if node in layers:
        return LayerMatch(node, end=node, bias_add=node) if _has_bias(node) else None
    if is_operator(node, "Add"):
        for value in node.inputs:
            layer = _producer(value)
            if layer is not None and layer in layers and not _has_bias(layer):
                return LayerMatch(layer, end=node, bias_add=node)
    return None


def _layer(node: ir.Node | None, layers: Layers) -> LayerMatch | None:
    return LayerMatch(node, end=node) if node is not None and node in layers else None


def _layer_then_layer(node: ir.Node, layers: Layers) -> LayerMatch | None:
    """Separable convolutions: the first layer of two."""
    if not is_layer_operator(node):
        return None
    matches = (_layer(_producer(value), layers) for value in node.inputs[:2])
    return next((match for match in matches if match is not None), None)


# A layer belongs to the first pattern that it is part of.
_PATTERNS: Final[tuple[Callable[[ir.Node, Layers], LayerMatch | None], ...]] = (
    _activation_then_add,
    _activation,
    _bias_add,
    _layer_then_layer,
)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else unquantized(value).producer()


def _has_bias(layer: ir.Node) -> bool:
    traits = traits_of(layer)
    if traits is None or traits.bias is None or traits.bias >= len(layer.inputs):
        return False
    return layer.inputs[traits.bias] is not None


def _is_before_batch_norm(node: ir.Node) -> bool:
    """An Identity that only a batch norm reads is not an activation: the layer goes on behind it."""
    if not is_operator(node, "Identity"):
        return False
    followers = readers(node.outputs[0])
    return len(followers) == 1 and is_operator(followers[0], "BatchNormalization")


def _rank(node: ir.Node, index: int) -> int | None:
    value = node.inputs[index]
    return None if value is None or value.shape is None else len(value.shape)


def _bounds(clip: ir.Node) -> tuple[float | None, float | None] | None:
    """Lower and upper bound, None where there is none; None altogether where one is not a constant."""
    bounds: list[float | None] = [None, None]
    for index, value in enumerate(clip.inputs[1:]):
        constant = constant_array(value)
        if value is not None and (constant is None or constant.size != 1):
            return None
        bounds[index] = None if constant is None else float(constant.reshape(()))
    return bounds[0], bounds[1]
