"""Removes nodes that do nothing in inference, and n-ary Sum, which is an Add in disguise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.names import FreeNames
from rewriter.normalize.graphs import owning_graph


class EliminateNodesPass(ir.passes.InPlacePass):
    """Removes nodes of the main graph that pass their input on.

    1. Identity.
    2. Dropout in inference mode (no training_mode input, or a constant false one) whose mask is not used.
    3. Sum of n inputs becomes n - 1 Adds, of one input nothing.
    4. Where the output is a graph output, the input takes its name; where the input has a name of its own
       to keep (a graph input, initializer or graph output), or belongs to another graph, the node stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        names = FreeNames(model)
        for node in model.graph:
            rule = _RULES.get(node.op_type) if node.domain == "" else None
            if rule is not None and rule(node, names):
                modified = True
        return ir.passes.PassResult(model, modified)


def _try_bypass(node: ir.Node, names: FreeNames) -> bool:
    """Let the users of the first output read the first input; True if done and the node removed."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return False
    graph = owning_graph(node)
    if y.is_graph_output():
        producer = x.producer()
        if producer is None or producer.graph is not graph or x.is_graph_output():
            return False
        name = y.name
        y.name = None
        y.replace_all_uses_with(x, replace_graph_outputs=True)
        x.name = name
    else:
        y.replace_all_uses_with(x)
    if x.type is None:
        x.type = y.type
    if x.shape is None:
        x.shape = y.shape
    graph.remove(node, safe=True)
    return True


def _try_dropout(node: ir.Node, names: FreeNames) -> bool:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        training = constant_array(node.inputs[2])
        if training is None or training.any():
            return False
    return _try_bypass(node, names)


def _try_sum(node: ir.Node, names: FreeNames) -> bool:
    if len(node.inputs) == 1:
        return _try_bypass(node, names)
    graph, total = owning_graph(node), node.inputs[0]
    for operand in node.inputs[1:-1]:
        add = ir.node("Add", [total, operand])
        add.outputs[0].type = node.outputs[0].type
        add.outputs[0].name = names.take(f"{node.outputs[0].name}_sum")
        graph.insert_before(node, add)
        total = add.outputs[0]
    last = node.inputs[-1]
    node.resize_inputs(2)
    node.replace_input_with(0, total)
    node.replace_input_with(1, last)
    node.op_type = "Add"
    return True


_RULES: Final[Mapping[str, Callable[[ir.Node, FreeNames], bool]]] = {
    "Identity": _try_bypass,
    "Dropout": _try_dropout,
    "Sum": _try_sum,
}
