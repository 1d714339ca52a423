"""Where the loss attaches, what it computes, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.quantization import IntegerRange
from rewriter.recipe import GraphLoss
from rewriter.training.losses import attach_loss
from tests.rewriter.training import nets


def identity_model(shape: list[object], op_type: str = "Identity", **attributes: object) -> ir.Model:
    nodes = [nets.node(op_type, ["x"], "y", **attributes)]
    return nets.model(nodes, {}, {"y": shape}, inputs={"x": shape})


def loss_value(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    attachment = attach_loss(model, feeds.pop("loss"))
    model.graph.outputs[:] = [attachment.loss]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, feeds)[0]


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax(scores)[label]; classes last, float64."""
    scores = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_softmax[np.arange(len(scores)), labels.reshape(-1)].mean()


@pytest.mark.parametrize(
    ("declared", "actual", "class_axis", "label_shape"),
    [
        (["N", 5], (3, 5), 1, ("N",)),
        (["N", 5, 1, 1], (3, 5, 1, 1), 1, ("N",)),
        (["N", 1, 1, 5], (3, 1, 1, 5), 3, ("N",)),
        (["N", "T", 5], (3, 7, 5), 2, ("N", "T")),
        (["N", 5, 4, 6], (3, 5, 4, 6), 1, ("N", 4, 6)),
        (["N", 5, "D", "H", "W"], (3, 5, 2, 4, 6), 1, ("N", "D", "H", "W")),
        ([3, 5], (3, 5), 1, (3,)),
    ],
)
def test_cross_entropy_reads_the_classes_where_the_shape_puts_them(
    declared: list[object], actual: tuple[int, ...], class_axis: int, label_shape: tuple[object, ...]
) -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(actual).astype(np.float32) * 3
    last = np.moveaxis(scores, class_axis, -1)
    sizes = dict(zip(declared, actual, strict=True))
    labels = rng.integers(0, 5, [sizes[dim] for dim in label_shape])

    model = identity_model(declared)
    attachment = attach_loss(model.clone(), "cross_entropy")
    found = loss_value(model, {"loss": "cross_entropy", "x": scores, "labels": labels})

    assert attachment.target is not None
    assert (attachment.target.name, attachment.target.dtype) == ("labels", ir.DataType.INT64)
    assert attachment.target_shape == label_shape
    assert found.shape == ()
    np.testing.assert_allclose(found, cross_entropy(last, labels), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "l1", "bce_with_logits"])
def test_losses_against_targets_equal_their_formula(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((4, 3)) * 3, [[0.0, 300.0, -300.0]]]).astype(np.float32)
    targets = rng.random((5, 3)).astype(np.float32)
    x64 = x.astype(np.float64)
    expected = {
        "mse": ((x64 - targets) ** 2).mean(),
        "l1": np.abs(x64 - targets).mean(),
        "bce_with_logits": (np.maximum(x64, 0) - x64 * targets + np.log1p(np.exp(-np.abs(x64)))).mean(),
    }[kind]

    found = loss_value(identity_model(["N", 3]), {"loss": kind, "x": x, "targets": targets})

    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
def test_cross_entropy_goes_before_a_final_softmax_and_says_so(op_type: str) -> None:
    attachment = attach_loss(identity_model(["N", 5], op_type, axis=1), "cross_entropy")
    assert (attachment.output, attachment.attached_to) == ("y", "x")
    assert op_type in attachment.warnings[0]


def test_the_quantizer_of_a_softmax_is_passed_over() -> None:
    model = identity_model(["N", 5], "Softmax", axis=-1)
    graph = model.graph
    nets.quantize(model, "y", IntegerRange(0, 255), np.float32(1 / 255), 0)
    graph.outputs[:] = [next(o for n in graph for o in n.outputs if o.name == "y_fake_quantized")]
    assert attach_loss(model, "cross_entropy").attached_to == "x"


def test_a_reshaped_softmax_is_passed_over_too() -> None:
    nodes = [nets.node("Softmax", ["x"], "p", axis=1), nets.node("Flatten", ["p"], "y", axis=1)]
    model = nets.model(nodes, {}, {"y": ["N", 5]}, inputs={"x": ["N", 5, 1, 1]})
    assert attach_loss(model, "cross_entropy").attached_to == "x"


def test_a_softmax_over_another_axis_stays_and_is_warned_about() -> None:
    attachment = attach_loss(identity_model(["N", 5, 4, 4], "Softmax", axis=-1), "cross_entropy")
    assert attachment.attached_to == "y"
    assert "Softmax" in attachment.warnings[0]


def test_bce_with_logits_goes_before_a_final_sigmoid() -> None:
    assert attach_loss(identity_model(["N", 5], "Sigmoid"), "bce_with_logits").attached_to == "x"
    assert attach_loss(identity_model(["N", 5], "Sigmoid"), "mse").attached_to == "y"


def test_of_several_outputs_the_first_float_one_is_taken_with_a_warning_that_says_how_to_choose() -> None:
    nodes = [
        nets.node("Shape", ["x"], "size"),
        nets.node("Relu", ["x"], "a"),
        nets.node("Neg", ["x"], "b"),
    ]
    model = nets.model(nodes, {}, {"a": ["N", 5], "b": ["N", 5]}, inputs={"x": ["N", 5]})
    size = next(o for n in model.graph for o in n.outputs if o.name == "size")
    model.graph.outputs.insert(0, size)

    first = attach_loss(model.clone(), "cross_entropy")
    named = attach_loss(model.clone(), GraphLoss(output="b", kind="cross_entropy"))

    assert (first.output, named.output) == ("a", "b")
    assert '"output"' in first.warnings[0]
    assert named.warnings == ()


def test_names_in_use_are_left_alone() -> None:
    model = nets.model(
        [nets.node("Add", ["labels", "targets"], "loss")],
        {},
        {"loss": ["N", 5]},
        inputs={"labels": ["N", 5], "targets": ["N", 5]},
    )
    attachment = attach_loss(model, "cross_entropy")
    assert attachment.target is not None
    assert attachment.target.name not in ("labels", "targets")
    assert attachment.loss.name != "loss"
    names = [value.name for value in model.graph.inputs]
    assert len(set(names)) == len(names) == 3


def test_a_graph_computes_its_own_loss() -> None:
    nodes = [nets.node("ReduceMean", ["x"], "own", keepdims=0)]
    model = nets.model(nodes, {}, {"own": []})
    attachment = attach_loss(model, GraphLoss(output="own"))
    assert (attachment.kind, attachment.target, attachment.loss.name) == ("graph", None, "own")


def test_a_loss_of_shape_one_becomes_a_scalar() -> None:
    nodes = [nets.node("ReduceMean", ["x"], "own", keepdims=1)]
    model = nets.model(nodes, {}, {"own": [1, 1]})
    x = np.arange(20, dtype=np.float32).reshape(2, 10)
    assert loss_value(model, {"loss": GraphLoss(output="own"), "x": x}) == 9.5


@pytest.mark.parametrize(
    ("shape", "loss", "says"),
    [
        (["N", 5], GraphLoss(output="z"), "'y'"),
        (["N", 5], GraphLoss(output="y"), "not a scalar"),
        (["N"], "cross_entropy", "batch and a class axis"),
        (["N", 1], "cross_entropy", "single class"),
    ],
)
def test_what_cannot_carry_the_loss_is_refused(shape: list[object], loss: object, says: str) -> None:
    with pytest.raises(QatError, match=says) as caught:
        attach_loss(identity_model(shape), loss)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.field) == (ErrorCode.LOSS_INVALID, "loss")


def test_an_output_of_unknown_shape_is_refused() -> None:
    model = identity_model(["N", 5])
    model.graph.outputs[0].shape = None
    with pytest.raises(QatError, match="shape of the output") as caught:
        attach_loss(model, "mse")
    assert caught.value.code == ErrorCode.LOSS_INVALID
