"""Attaches the recipe's loss to a model.

Built-in losses are means over all elements (cross entropy: over all labels); they add one graph input:

    cross_entropy    labels   int64    -log softmax(x)[label]; classes on axis 1, for rank 3 [N, T, C] last
    mse, l1          targets  float32  (x - t)^2, |x - t|
    bce_with_logits  targets  float32  max(x, 0) - x t + log(1 + exp(-|x|))

Cross entropy applies the softmax itself, so on an output that ends in one it is attached to the softmax's
input: the softmax of a softmax has another gradient. The same holds for bce_with_logits and Sigmoid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.fake_quantize import is_fake_quantize
from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.recipe import GraphLoss, LossKind, LossName

Dim = int | str | None


@dataclasses.dataclass(frozen=True)
class Attachment:
    """A loss in a graph.

    Attributes:
        loss: float32 scalar; not yet a graph output.
        kind: the built-in loss, or "graph" when the model computes its own.
        output: the model output that was chosen.
        attached_to: the value that the loss reads: the output, or the logits behind it; for "graph" the
            output itself.
        target: the graph input that was added, None for "graph".
        target_shape: its shape; symbolic dimensions by name, None where nothing is known.
        warnings: what a person should know about the choice.
    """

    loss: ir.Value
    kind: LossKind
    output: str
    attached_to: str
    target: ir.Value | None
    target_shape: tuple[Dim, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ClassLayout:
    """Where the classes are in a tensor of scores.

    Attributes:
        axis: class axis of the tensor.
        flatten: axis to Flatten at before the loss, so that the classes come to lie on axis 1; None: not.
        labels: shape of the labels.
    """

    axis: int
    flatten: int | None
    labels: tuple[Dim, ...]


def class_layout(shape: Sequence[Dim]) -> ClassLayout | None:
    """[N, C], [N, C, 1, ...] and [N, 1, 1, C]: labels [N]; [N, T, C]: labels [N, T]; [N, C, d1, d2, ...]:
    labels [N, d1, d2, ...]. None for fewer than two dimensions."""
    rank = len(shape)
    if rank < 2:
        return None
    batch = (shape[0],)
    if rank == 2:
        return ClassLayout(1, None, batch)
    if all(dim == 1 for dim in shape[2:]):
        return ClassLayout(1, 1, batch)
    if rank == 3:
        return ClassLayout(2, 2, tuple(shape[:2]))
    if all(dim == 1 for dim in shape[1:-1]):
        return ClassLayout(rank - 1, 1, batch)
    return ClassLayout(1, None, (*batch, *shape[2:]))


def loss_output(outputs: Sequence[tuple[str, bool]], loss: LossName | GraphLoss) -> int:
    """Index of the output that the loss belongs to: the one named, else the first float32 one.

    Args:
        outputs: (name, whether it is float32) of each model output.

    Raises:
        QatError: `loss_invalid`.
    """
    names = [name for name, _ in outputs]
    if isinstance(loss, GraphLoss):
        if loss.output not in names:
            raise _invalid(f"The model has no output {loss.output!r}; it has {_quoted(names)}.")
        index = names.index(loss.output)
        if not outputs[index][1]:
            raise _invalid(f"The output {loss.output!r} is not float32: a loss needs a float32 output.")
        return index
    for index, (_, is_float) in enumerate(outputs):
        if is_float:
            return index
    raise _invalid(f"None of the outputs {_quoted(names)} is float32: there is nothing to attach a loss to.")


def attach_loss(model: ir.Model, loss: LossName | GraphLoss) -> Attachment:
    """Add the nodes of the loss to `model`, and the input it needs; its outputs stay as they are.

    Raises:
        QatError: `loss_invalid`, saying which output cannot carry the loss and what to write instead.
    """
    graph = model.graph
    float_outputs = [(o.name or "", o.dtype == ir.DataType.FLOAT) for o in graph.outputs]
    output = graph.outputs[loss_output(float_outputs, loss)]
    kind = loss.kind if isinstance(loss, GraphLoss) else loss
    if kind is None:
        return _own_loss(model, output)
    warnings = []
    if not isinstance(loss, GraphLoss) and sum(is_float for _, is_float in float_outputs) > 1:
        warnings.append(
            f"The loss is attached to the first float32 output, {output.name!r}; the recipe's "
            f'loss = {{"output": NAME, "kind": {kind!r}}} attaches it to another.'
        )
    builder = _Builder(model)
    rule = _LOSSES[kind]
    source, skipped, suspicion = _before_activation(output, rule)
    if skipped is not None:
        warnings.append(
            f"{kind} is attached to {source.name!r}, the input of the {skipped} that ends in the output "
            f"{output.name!r}, because it applies that function itself."
        )
    elif suspicion is not None:
        warnings.append(
            f"The output {output.name!r} comes out of a {suspicion}, and {kind} applies that function again; "
            "name an output with the scores before it."
        )
    value, target = rule.build(builder, source)
    value.name = builder.names.take("loss")
    graph.inputs.append(target)
    assert target.shape is not None
    return Attachment(
        loss=value,
        kind=kind,
        output=output.name or "",
        attached_to=source.name or "",
        target=target,
        target_shape=dims(target.shape),
        warnings=tuple(warnings),
    )


def dims(shape: ir.Shape) -> tuple[Dim, ...]:
    """The dimensions as int, name, or None where nothing is known."""
    return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)


class _Builder:
    """Appends nodes to a graph under names that are not in use."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self.names = FreeNames(model)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shapes: Sequence[ir.Shape | None],
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """Append a node with one output per shape; the first output."""
        name = self.names.take(f"loss/{op_type}")
        outputs = [
            ir.Value(name=self.names.take(f"{name}:{i}"), shape=shape, type=ir.TensorType(dtype))
            for i, shape in enumerate(shapes)
        ]
        self._graph.append(ir.node(op_type, inputs, attributes, outputs=outputs, name=name))
        return outputs[0]

    def constant(self, value: float | Sequence[int]) -> ir.Value:
        """A float32 scalar, or an int64 vector."""
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        return add_initializer(self._graph, self.names.take("loss/constant"), array)

    def target(self, wanted: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """A value for a graph input; it becomes one when the loss is complete."""
        return ir.Value(name=self.names.take(wanted), shape=ir.Shape(shape), type=ir.TensorType(dtype))


_Built = tuple[ir.Value, ir.Value]  # the loss, the target


def _cross_entropy(builder: _Builder, scores: ir.Value) -> _Built:
    shape = _known_shape(scores)
    layout = class_layout(dims(shape))
    if layout is None:
        raise _invalid(
            f"cross_entropy needs an output with a batch and a class axis; {scores.name!r} has the shape "
            f"{shape}. Name another output: loss = {{'output': NAME, 'kind': 'cross_entropy'}}."
        )
    if shape[layout.axis] == 1:
        raise _invalid(
            f"cross_entropy on {scores.name!r} of shape {shape} would see a single class: use "
            "bce_with_logits or mse, or name another output."
        )
    labels = builder.target("labels", ir.DataType.INT64, layout.labels)
    flat_labels = labels
    if layout.flatten is not None:
        first = layout.labels[0] if layout.flatten == 1 else None
        shape = ir.Shape([first, dims(shape)[layout.axis]])
        scores = builder.node("Flatten", [scores], [shape], {"axis": layout.flatten})
        if len(layout.labels) > 1:
            flat_labels = builder.node(
                "Reshape", [labels, builder.constant([-1])], [ir.Shape([None])], dtype=ir.DataType.INT64
            )
    # The second output, log softmax, is what the gradient kernel reads.
    loss = builder.node(
        "SoftmaxCrossEntropyLoss", [scores, flat_labels], [ir.Shape([]), shape], {"reduction": "mean"}
    )
    return loss, labels


def _mse(builder: _Builder, x: ir.Value) -> _Built:
    shape, targets = _targets(builder, x)
    difference = builder.node("Sub", [x, targets], [shape])
    return _mean(builder, builder.node("Mul", [difference, difference], [shape])), targets


def _l1(builder: _Builder, x: ir.Value) -> _Built:
    shape, targets = _targets(builder, x)
    return _mean(builder, builder.node("Abs", [builder.node("Sub", [x, targets], [shape])], [shape])), targets


def _bce_with_logits(builder: _Builder, x: ir.Value) -> _Built:
    """(1/2 - t) x + |x| / 2 + log(1 + exp(-|x|)): nothing overflows, and with sign(0) = 0 the gradient at
    x = 0, which quantized outputs do reach, is sigmoid(0) - t as it should be (max(x, 0) would give -t)."""
    shape, targets = _targets(builder, x)
    half = builder.constant(0.5)
    size = builder.node("Abs", [x], [shape])
    linear = builder.node("Mul", [builder.node("Sub", [half, targets], [shape]), x], [shape])
    exponential = builder.node("Exp", [builder.node("Neg", [size], [shape])], [shape])
    softening = builder.node(
        "Log", [builder.node("Add", [exponential, builder.constant(1.0)], [shape])], [shape]
    )
    hinge = builder.node("Add", [linear, builder.node("Mul", [size, half], [shape])], [shape])
    return _mean(builder, builder.node("Add", [hinge, softening], [shape])), targets


def _targets(builder: _Builder, x: ir.Value) -> tuple[ir.Shape, ir.Value]:
    shape = _known_shape(x)
    return shape, builder.target("targets", ir.DataType.FLOAT, dims(shape))


def _mean(builder: _Builder, x: ir.Value) -> ir.Value:
    return builder.node("ReduceMean", [x], [ir.Shape([])], {"keepdims": 0})


@dataclasses.dataclass(frozen=True)
class _Loss:
    """A built-in loss: how it is built, and the final activations that it applies itself."""

    build: Callable[[_Builder, ir.Value], _Built]
    includes: frozenset[str] = frozenset()


_LOSSES: Final[Mapping[LossName, _Loss]] = {
    "cross_entropy": _Loss(_cross_entropy, frozenset({"Softmax", "LogSoftmax"})),
    "mse": _Loss(_mse),
    "l1": _Loss(_l1),
    "bce_with_logits": _Loss(_bce_with_logits, frozenset({"Sigmoid"})),
}

# What may stand between such an activation and the output without changing which numbers come out.
_MOVES_ONLY: Final = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def _before_activation(output: ir.Value, rule: _Loss) -> tuple[ir.Value, str | None, str | None]:
    """Where the loss attaches, the operator skipped for it, or the one that should be and cannot."""
    value, moved = output, False
    while (node := value.producer()) is not None and (is_fake_quantize(node) or node.op_type in _MOVES_ONLY):
        moved = moved or not (is_fake_quantize(node) or node.op_type == "Identity")
        assert node.inputs[0] is not None
        value = node.inputs[0]
    if node is None or node.domain != "" or node.op_type not in rule.includes:
        return output, None, None
    scores = node.inputs[0]
    assert scores is not None
    # The targets of a Sigmoid have the shape of the output; labels have one of their own.
    attaches = not moved if node.op_type == "Sigmoid" else _same_classes(node, scores, output)
    return (scores, node.op_type, None) if attaches else (output, None, node.op_type)


def _same_classes(softmax: ir.Node, scores: ir.Value, output: ir.Value) -> bool:
    """Whether the softmax runs over the class axis, and its input takes the labels of the output."""
    if scores.shape is None or output.shape is None:
        return False
    layout, visible = class_layout(dims(scores.shape)), class_layout(dims(output.shape))
    if layout is None or visible is None or len(layout.labels) != len(visible.labels):
        return False
    attribute = softmax.attributes.get("axis")
    axis = -1 if attribute is None else attribute.as_int()
    return axis % len(scores.shape) == layout.axis


def _own_loss(model: ir.Model, output: ir.Value) -> Attachment:
    shape = output.shape
    if shape is None or any(dim != 1 for dim in shape):
        raise _invalid(
            f"The output {output.name!r} is not a scalar but has the shape {shape}: name an output that is "
            'the loss itself, or attach one with "kind".'
        )
    loss = output
    if len(shape):
        builder = _Builder(model)
        loss = builder.node("ReduceSum", [output], [ir.Shape([])], {"keepdims": 0})
        loss.name = builder.names.take("loss")
    name = output.name or ""
    return Attachment(loss, "graph", name, name, None, (), ())


def _known_shape(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise _invalid(
            f"The shape of the output {value.name!r} is not known, so that no loss can be attached; "
            "name another output, or declare its shape in the model."
        )
    return value.shape


def _invalid(message: str) -> QatError:
    return QatError(ErrorCode.LOSS_INVALID, message, field="loss")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
