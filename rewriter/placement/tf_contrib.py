"""Placement where tf.contrib.quantize (TensorFlow 1.15) put its quantizers, said for normalized ONNX graphs.

Rules:

1. Layers are 2-D Conv (depthwise too), Gemm, and MatMul by a matrix, with a float32 initializer as weight.
   TensorFlow matched variables and no constants; in an ONNX file every weight is an initializer, so all of
   them count as variables. `placement.layer_patterns` says which of them match, and with which nodes. A layer
   without bias, known activation and layer behind it matches nothing and gets nothing, weight included.
2. The weight of a match gets one quantizer for all that read it, narrow, asymmetric unless the recipe says
   `symmetric`. Asymmetric ones have one scale, as all had in TensorFlow: onnxruntime's QLinearConv fails on
   zero points per channel. Symmetric ones follow `per_channel`, if all layers that share the weight have
   their output channels along one axis. Bits are the most that one of these layers asks for.
3. The end of a match (activation, bias add, or the first of two convolutions) gets one for all that read it.
4. So does the bias add before a bypass Add.
5. So does an Add behind an activation, unless a Relu reads it.
6. Then, in graph order, so does every Add and Mul, whatever else it takes, with an operand that is quantized
   or was before a Reshape, MaxPool, ReduceMax or the like; unless its one reader is a Relu. These are always
   asymmetric: the original forgot to pass `symmetric` on. An operand that an Add or Mul without a quantizer
   makes counts too if that has an operand which this rule names and the scope left out.
7. Nothing else is quantized: not the inputs of the model, nor biases, Concat, pooling, Resize, Softmax, ...
8. What has a quantizer already, also behind a Reshape, gets no second one; others that read it stay as is.
9. Scope: a result is quantized if the node that makes it is in scope, a weight if all its readers are, a bias
   add before a bypass if it and all its readers are. An override with `quantize: false` puts its nodes out of
   scope. Rules 2 to 4 take bits and the rest from the layer, 5 and 6 from the Add or Mul.

Different on purpose:

* A quantized result that is an output of the model is so quantized. TensorFlow left the name to the float
  tensor, but had the loss read the quantized one: here the loss is attached to the output, and who runs the
  int8 model wants what was trained.
* MatMul by a matrix is a layer at any rank of the activation; from rank 3 on TensorFlow had a Reshape before
  and behind it, which its patterns did not know. One by a batch of matrices (BatchMatMul) is none.
* An operand that a Mul makes is no weight. Weight normalization that the graph still computes leaves its
  layer float; one of constants was computed by `rewriter.normalize`.
* HardSwish is one operator here (`rewriter.normalize`): its result is quantized like that of the Mul that it
  was, of 6 times its size; the Relu6 inside, which the original quantized too, is out of reach.
* Identity is an activation in the original; normalization has taken it out, unless it names an output.
* Quantizers that the model came with do not hide a layer.
* A scope that matches nothing is an error. Batch norms outside the scope are not folded.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Final

import onnx_ir as ir

from rewriter.fake_quantize import is_fake_quantize
from rewriter.operators import is_operator, weight_operand
from rewriter.placement.drafts import (
    Decision,
    Draft,
    activation_position,
    coarser_weight,
    order_of,
    readers,
    sorted_names,
    weight_axis,
    weight_position,
)
from rewriter.placement.layer_patterns import LayerMatch, find_matches, is_relu
from rewriter.placement.settings import NodeSettings, in_scope, settings_for
from rewriter.quantization import IntegerRange, QuantizedTensor, Quantizer, Skipped
from rewriter.recipe import Recipe
from rewriter.targets import TargetPolicy

_LISTED: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# HardSwish stands for the product that it is: its spellings in TensorFlow end in a Mul.
_SUMS_AND_PRODUCTS: Final = ("Add", "HardSwish", "Mul")
# TensorFlow's Reshape is Flatten too; its Max is ReduceMax, and GlobalMaxPool over the whole image.
_RESHAPES: Final = ("Reshape", "Flatten", "Identity")
_PASSED_THROUGH: Final = (*_RESHAPES, "MaxPool", "ReduceMax", "GlobalMaxPool")


def decide(graph: ir.Graph, recipe: Recipe, policy: TargetPolicy) -> Decision:
    """Every Conv, ConvTranspose, Gemm and MatMul is in `quantized_nodes` or `skipped`; one in both is
    quantized in a coarser way than the recipe asks."""
    placement = _Placement(graph, recipe, policy)
    placement.run()
    listed = [node for node in graph.all_nodes() if is_operator(node, *_LISTED)]
    notes = ((node, placement.note(node)) for node in listed)
    return Decision(
        drafts=list(placement.drafts.values()),
        skipped=[Skipped(node.name or "", node.op_type, note) for node, note in notes if note is not None],
        quantized_nodes=[node for node in graph if placement.is_quantized(node)],
    )


class _Placement:
    """Carries the rules out, in the original's order, which matters where two of them name one value.

    Attributes:
        drafts: by the value that they quantize.
    """

    def __init__(self, graph: ir.Graph, recipe: Recipe, policy: TargetPolicy) -> None:
        self.drafts: dict[ir.Value, Draft] = {}
        self._graph = graph
        self._recipe = recipe
        self._policy = policy
        self._order = order_of(graph)
        operands = ((node, weight_operand(node)) for node in graph if _why_no_layer(node, graph) is None)
        self._layers = {node: weight for node, weight in operands if weight is not None}
        self._matches = find_matches(graph, self._layers)
        self._matched = {match.layer for match in self._matches}
        # Adds and Muls that rules 5 and 6 name.
        self._named: set[ir.Node] = set()

    def run(self) -> None:
        self._quantize_weights()
        for match in self._matches:
            self._quantize_match(match)
        self._quantize_sums_and_products()

    def is_quantized(self, node: ir.Node) -> bool:
        """Whether it is a layer with a quantized weight, or an Add or Mul that rule 5 or 6 quantizes."""
        if node in self._layers:
            return self._is_read_quantized(node.inputs[self._layers[node].index])
        return node in self._named and _has_quantizer(node.outputs[0], self.drafts)

    def note(self, node: ir.Node) -> str | None:
        """Why a layer is not quantized, or how it is quantized in a coarser way than the recipe asks."""
        reason = _why_no_layer(node, self._graph)
        if reason is not None:
            return reason
        return self._coarser_weight(node) if self.is_quantized(node) else self._why_not(node)

    def _quantize_weights(self) -> None:
        sharers: dict[ir.Value, list[ir.Node]] = {}
        for match in self._matches:
            sharers.setdefault(self._layers[match.layer].value, []).append(match.layer)
        for value, layers in sharers.items():
            nodes = readers(value)
            if self._are_in_scope(nodes) and not _is_followed_by_quantizer(value, self.drafts):
                quantizer = self._weight_quantizer(value, layers, nodes)
                self.drafts[value] = Draft(weight_position(nodes, self._order), quantizer)

    def _weight_quantizer(
        self, value: ir.Value, layers: Sequence[ir.Node], nodes: Sequence[ir.Node]
    ) -> Quantizer:
        settings = max(map(self._settings, layers), key=lambda one: one.weight_bits)
        symmetric = self._is_symmetric(settings)
        axes = {self._weight_axis(layer) for layer in layers}
        return Quantizer(
            name=value.name or "",
            kind="weight",
            bits=settings.weight_bits,
            range=IntegerRange.for_weights(settings.weight_bits, symmetric=symmetric),
            symmetric=symmetric,
            axis=axes.pop() if len(axes) == 1 else None,
            tensors=(QuantizedTensor(value.name or "", sorted_names(nodes, self._order)),),
            ranges=settings.ranges,
            quant_delay=settings.quant_delay,
        )

    def _quantize_match(self, match: LayerMatch) -> None:
        settings = self._settings(match.layer)
        self._quantize_result(match.end, settings, symmetric=settings.symmetric)
        before_bypass = match.before_bypass
        if before_bypass is not None and self._are_in_scope(readers(before_bypass.outputs[0])):
            self._quantize_result(before_bypass, settings, symmetric=settings.symmetric)
        if match.post_add is not None and not any(map(is_relu, readers(match.post_add.outputs[0]))):
            settings = self._settings(match.post_add)
            self._quantize_result(match.post_add, settings, symmetric=settings.symmetric)
            self._named.add(match.post_add)

    def _quantize_sums_and_products(self) -> None:
        """Rule 6."""
        of_matches = (node for match in self._matches for node in (match.end, match.before_bypass))
        handled = self._named | {node for node in of_matches if node is not None}
        due: set[ir.Node] = set()
        for node in self._graph:
            if is_operator(node, *_SUMS_AND_PRODUCTS) and node not in handled and self._is_due(node, due):
                due.add(node)
                self._quantize_result(node, self._settings(node), symmetric=False)
        self._named |= due

    def _is_due(self, node: ir.Node, due: set[ir.Node]) -> bool:
        followers = readers(node.outputs[0])
        if len(followers) == 1 and is_relu(followers[0]):
            return False
        return any(self._comes_quantized(value, due) for value in node.inputs)

    def _comes_quantized(self, value: ir.Value | None, due: set[ir.Node]) -> bool:
        """Whether an operand was quantized before what it was passed through, or rule 6 counts it so."""
        while not self._is_read_quantized(value):
            producer = None if value is None else value.producer()
            if producer is None:
                return False
            if is_operator(producer, *_SUMS_AND_PRODUCTS):
                unquantized = (one for one in producer.inputs if not self._is_read_quantized(one))
                return any(one is not None and one.producer() in due for one in unquantized)
            if not is_operator(producer, *_PASSED_THROUGH):
                return False
            value = producer.inputs[0]
        return True

    def _quantize_result(self, node: ir.Node, settings: NodeSettings, *, symmetric: bool) -> None:
        value = node.outputs[0]
        if not self._are_in_scope([node]) or value.dtype != ir.DataType.FLOAT:
            return
        if _is_followed_by_quantizer(value, self.drafts):
            return
        tensor = QuantizedTensor(
            name=value.name or "",
            consumers=sorted_names(readers(value), self._order),
            graph_output=value.is_graph_output(),
        )
        quantizer = Quantizer(
            name=tensor.name,
            kind="activation",
            bits=settings.activation_bits,
            range=IntegerRange.for_activations(settings.activation_bits, symmetric=symmetric),
            symmetric=symmetric,
            axis=None,
            tensors=(tensor,),
            ranges=settings.ranges,
            quant_delay=settings.quant_delay,
        )
        self.drafts[value] = Draft(activation_position(value, self._order), quantizer)

    def _settings(self, node: ir.Node) -> NodeSettings:
        return settings_for(node, self._recipe)

    def _is_symmetric(self, settings: NodeSettings) -> bool:
        """Whether weights are."""
        return self._policy.symmetric_weights or settings.symmetric

    def _weight_axis(self, layer: ir.Node) -> int | None:
        settings = self._settings(layer)
        return weight_axis(self._layers[layer], settings, symmetric=self._is_symmetric(settings))

    def _are_in_scope(self, nodes: Iterable[ir.Node]) -> bool:
        return all(in_scope(node, self._recipe) and self._settings(node).quantize for node in nodes)

    def _is_read_quantized(self, value: ir.Value | None) -> bool:
        """Whether what reads this value, as it stands in the graph, reads a quantized one."""
        return value is not None and (value in self.drafts or is_fake_quantize(value.producer()))

    def _coarser_weight(self, layer: ir.Node) -> str | None:
        weight, settings = self._layers[layer], self._settings(layer)
        draft = self.drafts.get(weight.value)
        if draft is not None and draft.quantizer.axis != self._weight_axis(layer):
            return (
                "quantized with one scale for the whole weight: the layers that share it have their output "
                "channels along different axes"
            )
        return coarser_weight(weight, settings, symmetric=self._is_symmetric(settings))

    def _why_not(self, layer: ir.Node) -> str:
        if not in_scope(layer, self._recipe):
            return f"outside the recipe's scope {self._recipe.scope!r}"
        if not self._settings(layer).quantize:
            return "excluded by an override of the recipe"
        if layer not in self._matched:
            return (
                "it has no bias, and no activation (Relu, Clip to [0, 6]) or other layer behind it that "
                "tf.contrib.quantize takes together with it"
            )
        weight = self._layers[layer].value
        outside = [node.name for node in readers(weight) if not self._are_in_scope([node])]
        if outside:
            return f"its weight {weight.name!r} is read by {outside[0]!r} too, which is not to be quantized"
        return f"its weight {weight.name!r} has a quantizer already, which other nodes read"


def _has_quantizer(value: ir.Value, drafts: Container[ir.Value]) -> bool:
    return value in drafts or any(is_fake_quantize(use.node) for use in value.uses())


def _is_followed_by_quantizer(value: ir.Value, drafts: Container[ir.Value]) -> bool:
    """Whether the value has a quantizer, or what it is reshaped to has."""
    pending = [value]
    while pending:
        found = pending.pop()
        if _has_quantizer(found, drafts):
            return True
        pending.extend(use.node.outputs[0] for use in found.uses() if is_operator(use.node, *_RESHAPES))
    return False


# Guards: each gives a reason why a node is no layer, or None. The first reason counts.


def _why_no_layer(node: ir.Node, graph: ir.Graph) -> str | None:
    return next((why for guard in _GUARDS if (why := guard(node, graph)) is not None), None)


def _inside_a_body(node: ir.Node, graph: ir.Graph) -> str | None:
    return None if node.graph is graph else "inside the body of an If, Loop or Scan"


def _other_operator(node: ir.Node, graph: ir.Graph) -> str | None:
    if is_operator(node, "Conv", "Gemm", "MatMul"):
        return None
    return "tf.contrib.quantize quantizes convolutions and matrix products only, no transposed convolutions"


def _weight_not_constant(node: ir.Node, graph: ir.Graph) -> str | None:
    return "its weight is not a constant" if weight_operand(node) is None else None


def _wrong_rank(node: ir.Node, graph: ir.Graph) -> str | None:
    weight = weight_operand(node)
    rank = None if weight is None or weight.value.shape is None else len(weight.value.shape)
    if rank == (4 if node.op_type == "Conv" else 2):
        return None
    kind = "2-D convolutions" if node.op_type == "Conv" else "products with one matrix"
    return f"tf.contrib.quantize quantizes {kind} only, its weight has rank {rank}"


def _not_float32(node: ir.Node, graph: ir.Graph) -> str | None:
    weight = weight_operand(node)
    for value in (*([] if weight is None else [weight.value]), node.outputs[0]):
        if value.dtype != ir.DataType.FLOAT:
            found = "unknown" if value.dtype is None else value.dtype.name.lower()
            return f"the data type of {value.name!r} is {found}, not float32"
    return None


_GUARDS: Final[tuple[Callable[[ir.Node, ir.Graph], str | None], ...]] = (
    _inside_a_body,
    _other_operator,
    _weight_not_constant,
    _wrong_rank,
    _not_float32,
)
