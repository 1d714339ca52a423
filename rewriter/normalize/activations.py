"""Writes spelled-out activation functions as the operator they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.normalize.graphs import owning_graph


class FuseHardSwishPass(ir.passes.InPlacePass):
    """Finds HardSwish, x * clip(x + 3, 0, 6) / 6, in its usual spellings.

    1. Mul(x, Clip(Add(x, 3), 0, 6)) / 6, the division as Div by 6 or Mul by 1/6.
    2. Mul(x, Clip(Add(x, 3), 0, 6) / 6), the division likewise.
    3. Mul(x, HardSigmoid(x)) with alpha = 1/6, beta = 1/2.
    4. Operands of Add and Mul in either order. Values in between have no other user and are not graph
       outputs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.domain == "" and _try_hard_swish(node):
                modified = True
        return ir.passes.PassResult(model, modified)


def _try_hard_swish(node: ir.Node) -> bool:
    x = _hard_swish_input(node)
    if x is None:
        return False
    graph, old = owning_graph(node), node.outputs[0]
    hard_swish = ir.node("HardSwish", [x], name=node.name)
    new = hard_swish.outputs[0]
    new.type, new.shape = old.type, old.shape
    name = old.name
    old.name = None
    ir.convenience.replace_nodes_and_values(graph, node, [node], [hard_swish], [old], [new])
    new.name = name
    return True


def _hard_swish_input(node: ir.Node) -> ir.Value | None:
    """x, if `node` computes HardSwish(x)."""
    product = _undivided_by_six(node)
    if product is not None:
        mul = _inner(product, "Mul")
        return None if mul is None else _gated(mul, _relu6_of_x_plus_3)
    if node.op_type == "Mul":
        return _gated(node, _hard_sigmoid)
    return None


def _gated(mul: ir.Node, gate_input: Callable[[ir.Value], ir.Value | None]) -> ir.Value | None:
    """x, if `mul` is x * gate(x)."""
    for x, gate in (mul.inputs, tuple(reversed(mul.inputs))):
        if x is not None and gate is not None and gate_input(gate) is x:
            return x
    return None


def _hard_sigmoid(gate: ir.Value) -> ir.Value | None:
    """x, if `gate` is HardSigmoid(x) with the constants of HardSwish, or spelled out."""
    node = _inner(gate, "HardSigmoid")
    if node is not None:
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        return node.inputs[0] if _close(alpha, 1 / 6) and _close(beta, 0.5) else None
    producer = gate.producer()
    if producer is None or not _is_inner(gate):
        return None
    relu6 = _undivided_by_six(producer)
    return None if relu6 is None else _relu6_of_x_plus_3(relu6)


def _relu6_of_x_plus_3(gate: ir.Value) -> ir.Value | None:
    clip = _inner(gate, "Clip")
    if clip is None or len(clip.inputs) != 3:
        return None
    if not (_is_scalar(clip.inputs[1], 0.0) and _is_scalar(clip.inputs[2], 6.0)):
        return None
    add = _inner(clip.inputs[0], "Add")
    return None if add is None else _other_operand(add, 3.0)


def _undivided_by_six(node: ir.Node) -> ir.Value | None:
    """The other operand, if `node` divides by 6."""
    if node.domain != "":
        return None
    if node.op_type == "Div":
        return node.inputs[0] if _is_scalar(node.inputs[1], 6.0) else None
    return _other_operand(node, 1 / 6) if node.op_type == "Mul" else None


def _other_operand(node: ir.Node, constant: float) -> ir.Value | None:
    a, b = node.inputs
    if _is_scalar(b, constant):
        return a
    return b if _is_scalar(a, constant) else None


def _inner(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of type `op_type` that computes `value`, if it computes nothing else that is used."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or node.op_type != op_type or not _is_inner(value):
        return None
    return node


def _is_inner(value: ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _is_scalar(value: ir.Value | None, expected: float) -> bool:
    """True for a constant of one element whose rank cannot change the rank of the result."""
    constant = constant_array(value)
    return (
        constant is not None
        and constant.size == 1
        and constant.ndim <= 1
        and _close(float(constant.reshape(())), expected)
    )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
