"""The table of gradient rules, one per operator, and of the operators that stop the gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Final

import onnx_ir as ir

# One gradient per node input; None where none was asked for (`Context.needs`).
Gradients = Sequence[ir.Value | None]

# Called with the context and one gradient per differentiable output. An output that the loss does not
# depend on has gradient None; that happens only to rules of several outputs.
GradientFunction = Callable[..., Gradients]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the gradient passes one operator.

    Attributes:
        gradient: emits the gradient nodes.
        inputs: the inputs that the rule gives a gradient for, None for all. Any other floating-point input
            blocks: a parameter behind it cannot be trained.
        outputs: how many of the first outputs the rule takes gradients of, None for all. Any other
            floating-point output blocks.
        any_float: right for every floating-point type, not for float32 only.
        stops: inputs of this node whose gradient is exactly zero, beside those that are not floating point.
        obstacle: why the rule does not hold for this node, None where it does.
    """

    gradient: GradientFunction
    inputs: tuple[int, ...] | None
    outputs: int | None
    any_float: bool
    stops: Callable[[ir.Node], Collection[int]]
    obstacle: Callable[[ir.Node], str | None]

    def takes_input(self, index: int) -> bool:
        return self.inputs is None or index in self.inputs

    def takes_output(self, index: int) -> bool:
        return self.outputs is None or index < self.outputs


RULES: Final[dict[tuple[str, str], Rule]] = {}

# Outputs do not depend on the inputs' values, or are integers, truth values or piecewise constant: the
# derivative is zero wherever it exists.
STOPS: Final = frozenset(
    {
        *("Shape", "Size", "ConstantOfShape", "EyeLike", "Range", "NonZero", "ArgMax", "ArgMin", "OneHot"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"),
        *("IsInf", "IsNaN", "Sign", "Floor", "Ceil", "Round"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    }
)


def rule(
    *op_types: str,
    domain: str = "",
    inputs: tuple[int, ...] | None = (0,),
    outputs: int | None = 1,
    any_float: bool = False,
    stops: Callable[[ir.Node], Collection[int]] = lambda node: (),
    obstacle: Callable[[ir.Node], str | None] = lambda node: None,
) -> Callable[[GradientFunction], GradientFunction]:
    """Registers the decorated function as the rule of each of `op_types`; see `Rule` for the rest."""

    def register(gradient: GradientFunction) -> GradientFunction:
        for op_type in op_types:
            RULES[domain, op_type] = Rule(gradient, inputs, outputs, any_float, stops, obstacle)
        return gradient

    return register


def rule_of(node: ir.Node) -> Rule | None:
    return RULES.get((node.domain, node.op_type))


def stops_gradient(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in STOPS
