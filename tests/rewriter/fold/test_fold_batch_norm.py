"""Batch norms that fold compute the same; those that cannot are left, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.fold.matching import match_batch_norms
from rewriter.fold.report import FoldReport
from rewriter.load import load
from rewriter.normalize import normalize
from tests.rewriter.graphs import graph, listing, run

C4 = "float[4] gamma, float[4] beta, float[4] mean, float[4] var"
BN = "y = BatchNormalization(u, gamma, beta, mean, var)"


def with_statistics(text: str, **values: np.ndarray) -> ir.Model:
    """The graph, with positive variances."""
    model = graph(text, **values)
    for name, value in model.graph.initializers.items():
        if name.startswith("var"):
            value.const_value = ir.tensor(np.abs(value.const_value.numpy()) + 0.1, name=name)
    return model


def fold_and_compare(model: ir.Model) -> FoldReport:
    """Fold, and require that the outputs stay what they were in value, name and order."""
    rng = np.random.default_rng(1)
    inputs = {
        value.name: rng.standard_normal([d if isinstance(d, int) else 3 for d in value.shape]).astype("f")
        for value in model.graph.inputs
    }
    names = [output.name for output in model.graph.outputs]
    before = run(model, **inputs)
    report = fold_batch_norms(model)
    after = run(model, **inputs)
    assert [output.name for output in model.graph.outputs] == names
    for expected, actual in zip(before, after, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    return report


@pytest.mark.parametrize(
    ("signature", "layer"),
    [
        ("float[N,3,8,8] x) => (y) <float[4,3,3,3] w", "Conv(x, w)"),
        ("float[N,3,8,8] x) => (y) <float[4,3,3,3] w, float[4] b", "Conv<pads=[1,1,1,1]>(x, w, b)"),
        ("float[N,4,8,8] x) => (y) <float[4,1,3,3] w", "Conv<group=4>(x, w)"),
        ("float[N,3,8] x) => (y) <float[4,3,3] w, float[4] b", "Conv(x, w, b)"),
        ("float[N,3,5,5,5] x) => (y) <float[4,3,2,2,2] w", "Conv(x, w)"),
        ("float[N,3,8,8] x) => (y) <float[3,4,2,2] w", "ConvTranspose<strides=[2,2]>(x, w)"),
        ("float[N,6,8,8] x) => (y) <float[6,2,2,2] w, float[4] b", "ConvTranspose<group=2>(x, w, b)"),
        ("float[N,3] x) => (y) <float[3,4] w", "Gemm(x, w)"),
        ("float[N,3] x) => (y) <float[4,3] w, float[4] b", "Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)"),
        ("float[3,N] x) => (y) <float[3,4] w, float[1,4] b", "Gemm<transA=1>(x, w, b)"),
        ("float[N,3] x) => (y) <float[3,4] w, float[1] b", "Gemm(x, w, b)"),
        ("float[5,3] x) => (y) <float[3,4] w, float[5,1] b", "Gemm<beta=0.5>(x, w, b)"),
        ("float[N,3] x) => (y) <float[3,4] w", "MatMul(x, w)"),
        ("float[N,3,7] x) => (y) <float[4,3] w", "MatMul(w, x)"),
    ],
)
def test_folds_into(signature: str, layer: str) -> None:
    model = with_statistics(f"g ({signature}, {C4}> {{ [layer] u = {layer} [bn] {BN} }}")
    report = fold_and_compare(model)
    assert [(one.batch_norm, one.layer) for one in report.folded] == [("bn", "layer")]
    assert report.left == ()
    assert "BatchNormalization" not in listing(model)
    assert set(model.graph.initializers) <= {"w", "b", "layer_bias"}


@pytest.mark.parametrize(
    ("signature", "layer", "tensor"),
    [
        ("float[N,3,8,8] x) => (z) <float[4,3,3,3] w", "Conv(x, w)", "u"),
        ("float[N,3,8,8] x) => (z) <float[3,4,2,2] w", "ConvTranspose(x, w)", "u"),
        ("float[N,3] x) => (z) <float[3,4] w", "Gemm(x, w)", "u"),
        ("float[N,3] x) => (z) <float[3,4] w", "MatMul(x, w)", "u"),
        ("float[N,3,7] x) => (z) <float[4,3] w", "MatMul(w, x)", "u_biased"),
        ("float[N,4,8] x) => (z) <float w", "Mul(x, w)", "y"),  # stays a batch norm
    ],
)
def test_statistics_are_those_of_the_tensor_as_it_is_called_now(
    signature: str, layer: str, tensor: str
) -> None:
    """With a scale behind it that turns the sign of gamma."""
    model = with_statistics(
        f"g ({signature}, {C4}, float minus> {{ u = {layer} {BN} s = Mul(y, minus) z = Relu(s) }}",
        gamma=np.array([1, -2, 3, 4], np.float32),
        minus=np.float32(-0.5),
    )
    beta = model.graph.initializers["beta"].const_value.numpy().astype(np.float64)
    report = fold_and_compare(model)
    assert list(report.statistics) == [tensor]
    mean, deviation = report.statistics[tensor]
    np.testing.assert_array_equal(mean, -0.5 * beta)
    np.testing.assert_array_equal(deviation, [0.5, 1, 1.5, 2])
    assert mean.dtype == deviation.dtype == np.float64
    (relu,) = (node for node in model.graph if node.op_type == "Relu")
    assert relu.inputs[0].name == tensor


def test_one_channel_keeps_a_bias_of_one_element() -> None:
    model = with_statistics(
        "g (float[N,3,8,8] x) => (y) <float[1,3,3,3] w, float[1] b, float[1] gamma, float[1] beta, "
        f"float[1] mean, float[1] var> {{ u = Conv(x, w, b) {BN} }}"
    )
    fold_and_compare(model)
    assert [value.const_value.shape.numpy() for value in model.graph.initializers.values()] == [
        (1, 3, 3, 3),
        (1,),
    ]


def test_a_plain_matrix_product_becomes_a_gemm() -> None:
    model = with_statistics(f"g (float[N,3] x) => (y) <float[3,4] w, {C4}> {{ [l] u = MatMul(x, w) {BN} }}")
    fold_and_compare(model)
    assert listing(model) == "y = Gemm(x, w, l_bias)"


def test_a_weight_on_the_left_gets_its_shift_from_an_add() -> None:
    model = with_statistics(f"g (float[N,3,7] x) => (y) <float[4,3] w, {C4}> {{ [l] u = MatMul(w, x) {BN} }}")
    fold_and_compare(model)
    assert listing(model) == "u = MatMul(w, x)\ny = Add(u, l_bias)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("u = Relu(x)", "the operator before it is Relu"),
        ("u = Conv(x, w) z = Relu(u)", "has other readers"),
        ("v = Relu(x) u = Concat<axis=1>(v, v)", "the operator before it is Concat"),
        ("w2 = Relu(w) u = Conv(x, w2)", "is not a float constant"),
        ("b2 = Relu(b) u = Conv(x, w, b2)", "the bias of"),
    ],
)
def test_left_with_a_reason(body: str, reason: str) -> None:
    channels = "[8] gamma, float[8] beta, float[8] mean, float[8] var" if "Concat" in body else ""
    constants = f"float{channels}" if channels else C4
    outputs = "y, z" if "z =" in body else "y"
    signature = f"(float[N,4,8,8] x) => ({outputs}) <float[4,4,3,3] w, float[4] b, {constants}>"
    model = with_statistics(f"g {signature} {{ {body} [bn] {BN} }}")
    report = fold_and_compare(model)
    assert report.folded == ()
    assert [one.node for one in report.left] == ["bn"]
    assert reason in report.left[0].reason


def test_a_layer_whose_result_is_an_output_is_left() -> None:
    model = with_statistics(
        f"g (float[N,3,8,8] x) => (y, u) <float[4,3,3,3] w, {C4}> {{ u = Conv(x, w) {BN} }}"
    )
    assert "has other readers" in fold_and_compare(model).left[0].reason


def test_a_batched_matrix_product_has_its_channels_elsewhere() -> None:
    model = with_statistics(f"g (float[N,4,3] x) => (y) <float[3,4] w, {C4}> {{ u = MatMul(x, w) {BN} }}")
    assert "channels" in fold_and_compare(model).left[0].reason


@pytest.mark.parametrize("outputs", ["y", "y, float[4] m"])
def test_training_mode_is_inference_mode_unless_the_model_reads_the_new_statistics(outputs: str) -> None:
    model = with_statistics(
        f"g (float[N,3,8,8] x) => ({outputs}) <float[4,3,3,3] w, {C4}> {{ u = Conv(x, w) "
        "y, m, v = BatchNormalization<training_mode=1>(u, gamma, beta, mean, var) }"
    )
    report = fold_batch_norms(model)
    assert len(report.training_mode) == 1
    if outputs == "y":
        assert (len(report.folded), report.still_in_training_mode) == (1, ())
    else:
        assert [one.reason for one in report.left] == ["it is in training mode"]
        assert report.still_in_training_mode == report.training_mode


@pytest.mark.parametrize("variance", [-1.0, np.nan, np.inf])
def test_statistics_that_are_no_statistics_are_left(variance: float) -> None:
    model = graph(
        f"g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w, {C4}> {{ u = Conv(x, w) {BN} }}",
        var=np.array([1, 1, variance, 1], np.float32),
    )
    assert "not finite" in fold_batch_norms(model).left[0].reason


def test_layers_that_share_a_weight_get_their_own_where_their_batch_norms_differ() -> None:
    model = with_statistics(
        f"g (float[N,3,8,8] x) => (y, z) <float[4,3,3,3] w, {C4}, float[4] gamma2> "
        f"{{ u = Conv(x, w) {BN} v = Conv(x, w) z = BatchNormalization(v, gamma2, beta, mean, var) }}"
    )
    assert len(fold_and_compare(model).folded) == 2
    first, second = (node.inputs[1] for node in model.graph)
    assert first is not second
    assert "w" not in model.graph.initializers


def test_layers_that_share_a_weight_and_batch_norm_still_share_it() -> None:
    model = with_statistics(
        f"g (float[N,3,8,8] x) => (y, z) <float[4,3,3,3] w, {C4}> {{ r = Relu(x) "
        f"u = Conv(x, w) {BN} v = Conv(r, w) z = BatchNormalization(v, gamma, beta, mean, var) }}"
    )
    assert len(fold_and_compare(model).folded) == 2
    assert model.graph[1].inputs[1] is model.graph[2].inputs[1] is model.graph.initializers["w"]


def test_a_weight_that_something_else_reads_is_copied() -> None:
    model = with_statistics(
        f"g (float[N,3,8,8] x) => (y, z) <float[4,3,3,3] w, {C4}> {{ u = Conv(x, w) {BN} z = Relu(w) }}"
    )
    original = model.graph.initializers["w"].const_value.numpy().copy()
    fold_and_compare(model)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), original)


@pytest.mark.parametrize("layer", ["u = Conv(x, w)", "u = Relu(x)"])
def test_a_scale_behind_the_batch_norm_becomes_part_of_it(layer: str) -> None:
    model = with_statistics(
        f"g (float[N,4,8,8] x) => (z) <float[4,4,3,3] w, {C4}, float[4,1,1] a, float[1,4,1,1] b> "
        f"{{ {layer} {BN} s = Mul(y, a) t = Add(b, s) z = Relu(t) }}"
    )
    fold_and_compare(model)
    assert "Mul" not in listing(model)
    assert "Add" not in listing(model)


def test_a_scale_along_another_axis_stays() -> None:
    model = with_statistics(
        f"g (float[N,4,8,8] x) => (z) <float[4,4,3,3] w, {C4}, float[6] a> "
        f"{{ u = Conv(x, w) {BN} z = Mul(y, a) }}"
    )
    fold_and_compare(model)
    assert "Mul" in listing(model)


def test_merged_scales_do_not_change_another_batch_norm_with_the_same_gamma() -> None:
    model = with_statistics(
        f"g (float[N,4,8,8] x) => (z, v) <{C4}, float[4,1,1] a> {{ u = Relu(x) {BN} z = Mul(y, a) "
        "v = BatchNormalization(x, gamma, beta, mean, var) }"
    )
    fold_and_compare(model)
    assert "Mul" not in listing(model)


def test_matching_changes_nothing() -> None:
    model = with_statistics(f"g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w, {C4}> {{ u = Conv(x, w) {BN} }}")
    before = ir.to_proto(model).SerializeToString()
    pairs, left = match_batch_norms(model)
    assert (len(pairs), left) == (1, [])
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [
        ("ppocr2-cls", 35, 0),
        ("light-resnet50", 53, 0),
        ("light-densenet121", 59, 62),
        ("light-shufflenet", 49, 0),
    ],
)
def test_real_models(real_model: Callable[[str], Path], name: str, folded: int, left: int) -> None:
    model = load(real_model(name))
    normalize(model)
    shape = {"ppocr2-cls": (2, 3, 48, 96)}.get(name, (1, 3, 224, 224))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feed = {model.graph.inputs[0].name: x}
    before = run(model, **feed)
    report = fold_batch_norms(model)
    assert (len(report.folded), len(report.left)) == (folded, left)
    for expected, actual in zip(before, run(model, **feed), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
