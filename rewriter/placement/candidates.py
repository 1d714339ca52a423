"""Which nodes are quantized, as a unit with what the target fuses into them, and why others are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import onnx_ir as ir

from rewriter.operators import WeightOperand, is_constant, is_operator, traits_of, unquantized, weight_operand
from rewriter.placement.settings import NodeSettings, in_scope, settings_for
from rewriter.placement.signals import Signals
from rewriter.quantization import Skipped
from rewriter.recipe import Recipe
from rewriter.targets import IntegerOperators


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A node to quantize.

    Attributes:
        inputs: its activation operands, as they stand in the graph.
        weight: its constant weight, if it has one.
        output: the result of the unit: behind a fused bias Add and a fused activation.
    """

    node: ir.Node
    settings: NodeSettings
    inputs: tuple[ir.Value, ...]
    weight: WeightOperand | None
    output: ir.Value


@dataclasses.dataclass(frozen=True)
class _Context:
    graph: ir.Graph
    recipe: Recipe
    operators: IntegerOperators
    signals: Signals


def find_candidates(
    graph: ir.Graph, recipe: Recipe, operators: IntegerOperators, signals: Signals
) -> tuple[list[Candidate], list[Skipped]]:
    """Decide on every node of a type that the target quantizes, in graph order.

    Every Conv, ConvTranspose, Gemm and MatMul, also inside If and Loop bodies, is in one of the two lists;
    Add, Mul and pooling are listed as skipped only where they work on activations.
    """
    context = _Context(graph, recipe, operators, signals)
    candidates, skipped = [], []
    bias_adds: set[ir.Node] = set()
    for node in graph.all_nodes():
        if not is_operator(node, *operators.quantized) or node in bias_adds:
            continue
        reason = next((why for guard in _GUARDS if (why := guard(node, context)) is not None), None)
        if reason is None:
            candidate = _candidate(node, context)
            candidates.append(candidate)
            if (bias_add := _bias_add(node, operators)) is not None:
                bias_adds.add(bias_add)
        elif _is_layer(node) or _works_on_activations(node, signals):
            skipped.append(Skipped(node.name or "", node.op_type, reason))
    return candidates, skipped


def _candidate(node: ir.Node, context: _Context) -> Candidate:
    weight = weight_operand(node)
    return Candidate(
        node=node,
        settings=settings_for(node, context.recipe),
        inputs=_activations(node),
        weight=weight,
        output=_unit_output(node, context.operators),
    )


def _activations(node: ir.Node) -> tuple[ir.Value, ...]:
    """Operands that are neither the weight nor the bias."""
    if node.op_type == "MatMul":
        weight = weight_operand(node)
        positions = [0, 1] if weight is None else [1 - weight.index]
    else:
        traits = traits_of(node)
        assert traits is not None
        positions = list(range(traits.data, traits.data + (traits.data_inputs or 1)))
    return tuple(value for i in positions if i < len(node.inputs) and (value := node.inputs[i]) is not None)


def _unit_output(node: ir.Node, operators: IntegerOperators) -> ir.Value:
    bias_add = _bias_add(node, operators)
    output = (bias_add or node).outputs[0]
    follower = _only_reader(output)
    if follower is not None and _is_fused_activation(follower, output, operators):
        return follower.outputs[0]
    return output


def _bias_add(node: ir.Node, operators: IntegerOperators) -> ir.Node | None:
    """The Add of a constant that only this matrix product's result goes into.

    Other layers have an input for their bias: what normalization could not put there is no bias.
    """
    if not operators.fuses_bias_add or not is_operator(node, "MatMul") or weight_operand(node) is None:
        return None
    follower = _only_reader(node.outputs[0])
    if follower is None or not is_operator(follower, "Add"):
        return None
    return follower if any(is_constant(value) for value in follower.inputs) else None


def _is_fused_activation(node: ir.Node, x: ir.Value, operators: IntegerOperators) -> bool:
    if not is_operator(node, *operators.fused_activations) or node.inputs[0] is not x:
        return False
    return all(bound is None or is_constant(bound) for bound in node.inputs[1:])


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader = next(iter(uses)).node
    producer = value.producer()
    return reader if producer is not None and reader.graph is producer.graph else None


def _is_layer(node: ir.Node) -> bool:
    traits = traits_of(node)
    return traits is not None and traits.kind == "layer"


def _works_on_activations(node: ir.Node, signals: Signals) -> bool:
    return any(value in signals.carried for value in _activations(node))


# Guards: each gives a reason against quantizing the node, or None. The first reason counts.


def _inside_a_body(node: ir.Node, context: _Context) -> str | None:
    return None if node.graph is context.graph else "inside the body of an If, Loop or Scan"


def _outside_the_scope(node: ir.Node, context: _Context) -> str | None:
    return None if in_scope(node, context.recipe) else f"outside the recipe's scope {context.recipe.scope!r}"


def _excluded_by_override(node: ir.Node, context: _Context) -> str | None:
    return None if settings_for(node, context.recipe).quantize else "excluded by an override of the recipe"


def _not_float32(node: ir.Node, context: _Context) -> str | None:
    for value in (*_activations(node), *node.outputs[:1]):
        if value.dtype is None:
            return f"the data type of {value.name!r} is not known"
        if value.dtype != ir.DataType.FLOAT:
            return f"{value.name!r} is {value.dtype.name.lower()}, not float32"
    return None


def _weight_not_constant(node: ir.Node, context: _Context) -> str | None:
    if not _is_layer(node) or node.op_type == "MatMul" or weight_operand(node) is not None:
        return None
    return "its weight is not a constant"


def _bias_not_constant(node: ir.Node, context: _Context) -> str | None:
    traits = traits_of(node)
    if traits is None or traits.bias is None or len(node.inputs) <= traits.bias:
        return None
    bias = node.inputs[traits.bias]
    return None if bias is None or is_constant(unquantized(bias)) else "its bias is not a constant"


def _constant_operand(node: ir.Node, context: _Context) -> str | None:
    """An activation quantizer on a constant would be calibrated and trained without data; the runtime gains
    little from an integer Add or Mul alone, and as float it can still fuse with its neighbours."""
    if any(is_constant(unquantized(value)) for value in _activations(node)):
        return "one of its operands is a constant"
    return None


def _not_an_activation(node: ir.Node, context: _Context) -> str | None:
    for value in _activations(node):
        if unquantized(value) not in context.signals.carried and value not in context.signals.carried:
            return (
                f"{value.name!r} is computed from integers and constants alone (a mask, a position or a "
                "shape), not from the model's float inputs"
            )
    return None


def _feeds_softmax(node: ir.Node, context: _Context) -> str | None:
    return "a sum that feeds a Softmax (an attention mask)" if node in context.signals.softmax_sums else None


def _part_of_a_composite(node: ir.Node, context: _Context) -> str | None:
    if node not in context.signals.composite:
        return None
    return "part of a function of one tensor (GELU, SiLU, HardSwish, a normalization), which stays float"


def _quantized_at_run_time(node: ir.Node, context: _Context) -> str | None:
    """Pairs that normalization could not read (a computed scale) must not get a second layer."""
    read_by = (use.node for use in node.outputs[0].uses())
    made_by = (value.producer() for value in node.inputs if value is not None)
    if any(is_operator(n, "DequantizeLinear") for n in made_by) or any(
        is_operator(n, "QuantizeLinear", "DynamicQuantizeLinear") for n in read_by
    ):
        return "quantized in the model already, with a scale that is not a constant"
    return None


_GUARDS: Final[tuple[Callable[[ir.Node, _Context], str | None], ...]] = (
    _inside_a_body,
    _outside_the_scope,
    _excluded_by_override,
    _constant_operand,
    _not_float32,
    _weight_not_constant,
    _bias_not_constant,
    _quantized_at_run_time,
    _part_of_a_composite,
    _feeds_softmax,
    _not_an_activation,
)
