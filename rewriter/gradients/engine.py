"""Reverse-mode differentiation of a graph: appends the gradient nodes of a scalar loss.

Two passes over the nodes, both linear in nodes and edges: one from the loss back, which says for every
value whether its gradient can be computed, and the differentiation itself. The nodes of the graph are in
topological order, as ONNX requires.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.gradients.context import Builder, Context
from rewriter.gradients.registry import Rule, rule_of, stops_gradient
from rewriter.recipe import TrainingDevice


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A node that no gradient can be computed through, and why."""

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"the gradient cannot pass node {self.node!r} ({self.op}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Trainability:
    """Which of the candidates have a gradient.

    Attributes:
        trainable: names, in the order of the candidates.
        frozen: name of each other candidate, and why it has none.
    """

    trainable: tuple[str, ...]
    frozen: Mapping[str, str]


def trainability(graph: ir.Graph, loss: ir.Value, candidates: Sequence[ir.Value]) -> Trainability:
    """Decides which candidates (initializers or graph inputs) can be trained; changes nothing.

    A parameter counts as frozen as soon as one of its paths to the loss is blocked: the gradient along the
    others alone would be wrong.

    Raises:
        QatError: nothing_to_train, where no candidate is left.
    """
    obstacles = _obstacles(graph, loss)
    trainable: list[str] = []
    frozen: dict[str, str] = {}
    for value in candidates:
        name = value.name or ""
        obstacle = obstacles.get(value)
        if value.dtype != ir.DataType.FLOAT:
            frozen[name] = f"its data type is {_dtype_name(value)}; only float32 parameters are trained"
        elif value not in obstacles:
            frozen[name] = "the loss does not depend on it, or only through operators of zero derivative"
        elif obstacle is not None:
            frozen[name] = str(obstacle)
        else:
            trainable.append(name)
    if not trainable:
        raise QatError(ErrorCode.NOTHING_TO_TRAIN, _nothing_to_train(candidates, obstacles, frozen))
    return Trainability(tuple(trainable), frozen)


def _nothing_to_train(
    candidates: Sequence[ir.Value],
    obstacles: Mapping[ir.Value, Obstacle | None],
    frozen: Mapping[str, str],
) -> str:
    """Names one parameter, if possible one that a node blocks: there is something to do about that."""
    if not frozen:
        return "The graph has no parameters to train."
    blocked = next((value for value in candidates if obstacles.get(value) is not None), candidates[0])
    reason = frozen[blocked.name or ""]
    return f"None of the {len(frozen)} parameters has a gradient; {blocked.name!r}: {reason}."


def differentiate(
    graph: ir.Graph, loss: ir.Value, wrt: Sequence[ir.Value], *, device: TrainingDevice = "any"
) -> dict[ir.Value, ir.Value]:
    """Appends the nodes that compute dloss/dvalue for each value of `wrt` to the graph.

    Forward nodes may get further outputs (the indices of a MaxPool), so that the graph should be the
    training graph's own copy.

    Args:
        graph: at opset 18, nodes in topological order.
        loss: float32, one element.
        wrt: float32 values that the loss depends on. A graph input that is neither here nor has a
            `const_value` counts as data, not as a parameter.
        device: "cpu" allows forms that are good on the CPU only.

    Returns:
        Per value of `wrt` its gradient: float32, the value's shape; a value of its own each, computed by an
        appended node.

    Raises:
        QatError: gradient_unsupported, with the node that has no rule or that its rule does not cover;
            loss_invalid, where the loss is not one element.
    """
    obstacles = _obstacles(graph, loss)
    for value in wrt:
        _require_gradient(value, obstacles)

    forward = list(graph)
    active = _active(forward, obstacles, wrt)
    data = _data_dependent(graph, forward, wrt)
    builder = Builder(graph, device)
    contributions: dict[ir.Value, list[ir.Value]] = {loss: [_one(builder, loss)]}
    for node in reversed(forward):
        rule = rule_of(node)
        if rule is None or not any(output in contributions for output in node.outputs):
            continue
        needed = tuple(
            value is not None and value in active and rule.takes_input(i) and i not in rule.stops(node)
            for i, value in enumerate(node.inputs)
        )
        if not any(needed):
            continue
        outputs = node.outputs if rule.outputs is None else node.outputs[: rule.outputs]
        context = Context(builder, node, needed, data)
        gradients = rule.gradient(context, *[_collect(builder, contributions, output) for output in outputs])
        for operand, gradient, wanted in zip(node.inputs, gradients, needed, strict=False):
            if wanted and operand is not None and gradient is not None:
                _describe(gradient, operand)
                contributions.setdefault(operand, []).append(gradient)
    return _distinct(builder, contributions, wrt)


def _obstacles(graph: ir.Graph, loss: ir.Value) -> dict[ir.Value, Obstacle | None]:
    """Every value that the loss depends on with a derivative: what blocks it, None where nothing does."""
    found: dict[ir.Value, Obstacle | None] = {loss: None}
    for node in reversed(graph):
        reached = [i for i, output in enumerate(node.outputs) if output in found]
        if not reached or stops_gradient(node):
            continue
        rule = rule_of(node)
        downstream = next((o for i in reached if (o := found[node.outputs[i]]) is not None), None)
        general = downstream or _node_obstacle(node, rule, reached)
        stopped = () if rule is None else rule.stops(node)
        for i, value in enumerate(node.inputs):
            if value is None or i in stopped or not _may_be_float(value):
                continue
            obstacle = general
            if obstacle is None and rule is not None and not rule.takes_input(i):
                obstacle = _obstacle(node, f"its input {i} ({value.name!r}) can only be a constant")
            if found.get(value) is None:
                found[value] = obstacle
        for value in _captured(node):
            if _may_be_float(value) and found.get(value) is None:
                found[value] = downstream or _obstacle(node, "it has a subgraph")
    return found


def _node_obstacle(node: ir.Node, rule: Rule | None, reached: Sequence[int]) -> Obstacle | None:
    if rule is None:
        return _obstacle(node, "there is no gradient rule for this operator")
    for i in reached:
        if not rule.takes_output(i):
            return _obstacle(node, f"there is no gradient rule for its output {i}")
    if not rule.any_float:
        dtypes = (value.dtype for value in (*node.inputs, *node.outputs) if value is not None)
        odd = next((d for d in dtypes if d and d.is_floating_point() and d != ir.DataType.FLOAT), None)
        if odd is not None:
            return _obstacle(node, f"its data type is {odd.name}, not FLOAT")
    reason = rule.obstacle(node)
    return None if reason is None else _obstacle(node, reason)


def _obstacle(node: ir.Node, reason: str) -> Obstacle:
    return Obstacle(node.name or "", node.op_type, reason)


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """The values that the subgraphs of `node` read, those from outside among them."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (value for value in inner.inputs if value is not None)
            yield from graph.outputs


def _may_be_float(value: ir.Value) -> bool:
    """False where the data type is known and carries no gradient."""
    return value.dtype is None or value.dtype.is_floating_point()


def _require_gradient(value: ir.Value, obstacles: Mapping[ir.Value, Obstacle | None]) -> None:
    if value.dtype is not None and value.dtype != ir.DataType.FLOAT:
        reason = f"its data type is {_dtype_name(value)}, not FLOAT"
        raise QatError(ErrorCode.GRADIENT_UNSUPPORTED, f"Tensor {value.name!r} has no gradient: {reason}.")
    if value not in obstacles:
        raise QatError(
            ErrorCode.GRADIENT_UNSUPPORTED,
            f"Tensor {value.name!r} has no gradient: the loss does not depend on it, or only through "
            "operators of zero derivative.",
        )
    obstacle = obstacles[value]
    if obstacle is not None:
        raise QatError(
            ErrorCode.GRADIENT_UNSUPPORTED,
            f"Tensor {value.name!r} has no gradient: {obstacle}.",
            node=obstacle.node,
        )


def _active(
    forward: Sequence[ir.Node], obstacles: Mapping[ir.Value, Obstacle | None], wrt: Sequence[ir.Value]
) -> set[ir.Value]:
    """The values on a path from `wrt` to the loss."""
    active = set(wrt)
    for node in forward:
        rule = rule_of(node)
        if rule is None:
            continue
        stopped = rule.stops(node)
        if any(v in active and rule.takes_input(i) and i not in stopped for i, v in enumerate(node.inputs)):
            active.update(
                output
                for i, output in enumerate(node.outputs)
                if rule.takes_output(i) and output in obstacles
            )
    return active


def _data_dependent(graph: ir.Graph, forward: Sequence[ir.Node], wrt: Sequence[ir.Value]) -> set[ir.Value]:
    """The values that depend on a graph input other than a parameter."""
    parameters = set(wrt)
    data = {value for value in graph.inputs if value.const_value is None and value not in parameters}
    for node in forward:
        if any(value is not None and value in data for value in node.inputs):
            data.update(node.outputs)
    return data


def _one(builder: Builder, loss: ir.Value) -> ir.Value:
    shape = () if loss.shape is None else tuple(loss.shape.dims)
    if loss.dtype not in (None, ir.DataType.FLOAT) or any(dim != 1 for dim in shape):
        raise QatError(
            ErrorCode.LOSS_INVALID,
            f"The loss {loss.name!r} must be one float32 number, not {_dtype_name(loss)}{list(shape)}.",
        )
    return builder.constant(np.ones(len(shape) * (1,), np.float32))


def _collect(
    builder: Builder, contributions: dict[ir.Value, list[ir.Value]], value: ir.Value
) -> ir.Value | None:
    """The gradient of a value all of whose consumers are done: the sum of what they contributed."""
    gradients = contributions.get(value)
    if not gradients:
        return None
    if len(gradients) > 1:
        op_type = "Add" if len(gradients) == 2 else "Sum"
        prefix = f"gradient/{value.name}"
        (total,) = builder.node(op_type, tuple(gradients), {}, domain="", prefix=prefix)
        _describe(total, value)
        contributions[value] = [total]
    return contributions[value][0]


def _distinct(
    builder: Builder, contributions: dict[ir.Value, list[ir.Value]], wrt: Sequence[ir.Value]
) -> dict[ir.Value, ir.Value]:
    """The gradients of `wrt`: no two the same value (both sides of an Add), none a constant."""
    result: dict[ir.Value, ir.Value] = {}
    taken: set[ir.Value] = set()
    for value in wrt:
        gradient = _collect(builder, contributions, value)
        assert gradient is not None  # every path from `wrt` to the loss has a rule
        if gradient in taken or gradient.producer() is None:
            prefix = f"gradient/{value.name}"
            (gradient,) = builder.node("Identity", (gradient,), {}, domain="", prefix=prefix)
            _describe(gradient, value)
        taken.add(gradient)
        result[value] = gradient
    return result


def _describe(gradient: ir.Value, value: ir.Value) -> None:
    """Gives a gradient the type and shape of its value, which later rules decide by."""
    if gradient.type is None:
        gradient.type = value.type
    if gradient.shape is None:
        gradient.shape = None if value.shape is None else value.shape.copy()


def _dtype_name(value: ir.Value) -> str:
    return value.dtype.name if value.dtype is not None else "unknown"
