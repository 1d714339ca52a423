"""The four files of a bundle that train: their layout, their numbers, and what they leave alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.quantization import IntegerRange
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.checkpoint import read_checkpoint
from rewriter.training.derived import derived_values
from rewriter.training.runtime import open_session
from tests.rewriter.training import nets, stock

FILES = ["checkpoint", "eval_model.onnx", "optimizer_model.onnx", "training_model.onnx"]


def interface(values: object, loss: str = "") -> list[tuple[str, str]]:
    """Names and types of graph inputs or outputs, with the loss under one name."""
    return [("loss" if v.name == loss else v.name, str(v.type)) for v in values]  # type: ignore[attr-defined]


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {opset.domain: opset.version for opset in model.opset_import}


def with_step_counter(inputs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Ours has one frozen parameter more, the last of the parameters: the number of steps."""
    (scalar,) = interface(
        [onnx.helper.make_tensor_value_info("quantization_step", onnx.TensorProto.FLOAT, [])]
    )
    reserved = [i for i, (name, _) in enumerate(inputs) if "_grad" in name]
    position = reserved[0] if reserved else len(inputs)
    return [*inputs[:position], scalar, *inputs[position:]]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_layout_is_that_of_generate_artifacts(tmp_path: Path, optimizer: str) -> None:
    net = nets.mlp()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    stock.generate_artifacts(net, theirs, trainable=["W1", "b1", "W2", "b2"], frozen=[], optimizer=optimizer)
    write_training_artifacts(net, Recipe(optimizer=optimizer), ours)

    assert sorted(path.name for path in ours.iterdir()) == FILES
    for name in ("training_model.onnx", "eval_model.onnx"):
        a, b = onnx.load(ours / name), onnx.load(theirs / name)
        assert interface(a.graph.input) == with_step_counter(interface(b.graph.input))
        own_outputs = ["y"] if name == "eval_model.onnx" else []
        found = interface(a.graph.output, a.graph.output[0].name)
        assert [entry for entry in found if entry[0] not in own_outputs] == interface(
            b.graph.output, b.graph.output[0].name
        )
        assert a.ir_version == b.ir_version <= 10
        assert opsets(a).items() <= opsets(b).items()
        assert len(a.functions) == len(b.functions) == 0
        trainable_names = {"W1", "b1", "W2", "b2"}
        assert not trainable_names & {i.name for m in (a, b) for i in m.graph.initializer}

    a, b = onnx.load(ours / "optimizer_model.onnx"), onnx.load(theirs / "optimizer_model.onnx")
    assert interface(a.graph.input) == interface(b.graph.input)
    assert [t for _, t in interface(a.graph.output)] == [t for _, t in interface(b.graph.output)]
    (mine,), (stocks) = a.graph.node, b.graph.node[0]
    assert (mine.op_type, mine.domain, list(mine.input)) == (
        stocks.op_type,
        stocks.domain,
        list(stocks.input),
    )
    settings = [{at.name: onnx.helper.get_attribute_value(at) for at in n.attribute} for n in (mine, stocks)]
    assert settings[0] | {"epsilon": 0} == settings[1] | {"epsilon": 0}
    assert opsets(a) == opsets(b)
    assert a.ir_version <= 10

    expected = read_checkpoint(theirs / "checkpoint") | {"quantization_step": np.float32(0)}
    for name, value in read_checkpoint(ours / "checkpoint").items():
        np.testing.assert_array_equal(value, expected.pop(name))
    assert not expected


def test_frozen_weights_keep_their_place_among_the_parameters(tmp_path: Path) -> None:
    nodes = [nets.node("MatMul", ["x", "A"], "h"), nets.node("MatMul", ["h", "B"], "y")]
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((10, 200)).astype("f"), rng.standard_normal((200, 4)).astype("f")
    net = nets.model(nodes, {"A": a, "B": b}, {"y": ["N", 4]})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    stock.generate_artifacts(net, theirs, trainable=["B"], frozen=["A"])
    report = write_training_artifacts(net, Recipe(frozen=("A",)), ours)

    assert (report.trainable, list(report.frozen)) == (("B",), ["A"])
    for name in ("training_model.onnx", "eval_model.onnx"):
        mine, stocks = onnx.load(ours / name), onnx.load(theirs / name)
        assert interface(mine.graph.input) == with_step_counter(interface(stocks.graph.input))
        assert not any(tensor.name == "A" for tensor in mine.graph.initializer)
    x, labels = nets.batch()
    (loss, found), (stock_loss, expected) = (stock.gradients(f, x, labels) for f in (ours, theirs))
    assert found.keys() == expected.keys() == {"B"}
    np.testing.assert_allclose(loss, stock_loss, rtol=1e-6)
    np.testing.assert_allclose(found["B"], expected["B"], rtol=1e-4, atol=1e-6)


def test_gradients_of_a_small_resnet_equal_those_of_generate_artifacts(tmp_path: Path) -> None:
    net = nets.small_resnet()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    report = write_training_artifacts(net, Recipe(), ours)
    assert set(report.trainable) == set(net.graph.initializers)
    stock.generate_artifacts(net, theirs, trainable=list(report.trainable), frozen=[])
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((5, 3, 8, 8)).astype("f"), rng.integers(0, nets.CLASSES, 5)

    (loss, found), (stock_loss, expected) = (stock.gradients(f, x, labels) for f in (ours, theirs))

    np.testing.assert_allclose(loss, stock_loss, rtol=1e-6)
    assert found.keys() == expected.keys() == set(report.trainable)
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())


def reference_gradients(bits: int, x: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of `nets.quantized_mlp` in float64, from the formulas of LSQ."""
    tensors = {
        name: value.const_value.numpy() for name, value in nets.quantized_mlp(bits).graph.initializers.items()
    }
    w = {name: tensors[name].astype(np.float64) for name in ("W1", "b1", "W2", "b2")}

    def quantize(value: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        scale, zero = (tensors[f"{name}_{s}"].astype(np.float64) for s in ("scale", "zero_point"))
        qmin, qmax = limits(name)
        q = np.rint(value / scale) + zero
        return (np.clip(q, qmin, qmax) - zero) * scale, (qmin <= q) & (q <= qmax)

    def limits(name: str) -> tuple[int, int]:
        half = 2 ** (bits - 1) - 1
        return (-half, half) if name.startswith("W") else (0, 2**bits - 1)

    def backward(name: str, dy: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Notes the gradient of p where s = s0 exp(p) and p = 0, which is s dL/ds; returns dL/dvalue."""
        y, in_range = quantize(value, name)
        summed = dy * np.where(in_range, y - value, y)
        # Elements that share a scale: a column of a weight, the features of one sample.
        total = summed.sum(axis=0) if name.startswith("W") else summed.sum()
        elements = value.shape[0] if name.startswith("W") else value.shape[1]
        g = 1 / np.sqrt(elements * limits(name)[1])
        gradients[f"{name}_scale.log_multiplier"] = g * total
        if name == "x":  # has two sides: z = clip(round(z0 + width o)), LSQ+
            width = limits(name)[1] - limits(name)[0]
            outside = (dy * ~in_range).sum()
            gradients["x_zero_point.offset"] = -g * width * tensors["x_scale"] * outside
        return dy * in_range

    gradients: dict[str, np.ndarray] = {}
    xq, w1q, w2q = quantize(x, "x")[0], quantize(w["W1"], "W1")[0], quantize(w["W2"], "W2")[0]
    h = xq @ w1q + w["b1"]
    r = np.maximum(h, 0)
    rq = quantize(r, "r")[0]
    y = rq @ w2q + w["b2"]
    shifted = y - y.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(x))
    dy = np.exp(log_softmax)
    dy[rows, labels] -= 1
    dy /= len(x)
    gradients["b2"] = dy.sum(axis=0)
    gradients["W2"] = backward("W2", rq.T @ dy, w["W2"])
    dh = backward("r", dy @ w2q.T, r) * (h > 0)
    gradients["b1"] = dh.sum(axis=0)
    gradients["W1"] = backward("W1", xq.T @ dh, w["W1"])
    backward("x", dh @ w1q.T, x.astype(np.float64))
    return -log_softmax[rows, labels].mean(), gradients


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_gradients_of_a_quantized_net_equal_an_independent_reference(tmp_path: Path, bits: int) -> None:
    x, labels = nets.batch(64)
    write_training_artifacts(nets.quantized_mlp(bits), Recipe(), tmp_path)

    loss, found = stock.gradients(tmp_path, x, labels)

    expected_loss, expected = reference_gradients(bits, x, labels)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            found[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("adamw", 1e-3), ("sgd", 0.01), ("sgd", 0.1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_lowers_the_loss_and_leaves_the_scales_sane(
    tmp_path: Path, optimizer: str, learning_rate: float, bits: int
) -> None:
    net = nets.quantized_mlp(bits)
    report = write_training_artifacts(net, Recipe(optimizer=optimizer), tmp_path)
    session = open_session(tmp_path)
    session.optimizer.set_learning_rate(learning_rate)
    losses = []
    for step in range(300):
        session.module.train()
        losses.append(float(session.module(*nets.batch(seed=step))))
        session.optimizer.step()
        session.module.lazy_reset_grad()

    assert np.mean(losses[-30:]) < 0.8 * np.mean(losses[:30])
    initial = {name: net.graph.initializers[name].const_value.numpy() for name in report.scale_parameters}
    parameters = {name: np.array(p.data) for name, p in session.state.parameters}
    evaluation = ir.from_proto(onnx.load(tmp_path / "eval_model.onnx"))
    trained = derived_values(evaluation, parameters, initial)
    assert trained.keys() == {"x_scale", "r_scale", "W1_scale", "W2_scale"}
    moved = [np.abs(np.log(trained[name] / initial[name])).max() for name in trained]
    assert max(moved) < np.log(4)
    assert max(moved) > 0


def test_the_eval_model_gives_the_loss_and_the_outputs_of_the_trained_state(tmp_path: Path) -> None:
    report = write_training_artifacts(nets.quantized_mlp(), Recipe(), tmp_path)
    session = open_session(tmp_path)
    x, labels = nets.batch()
    session.module.eval()
    before, scores = session.module(x, labels)
    assert (report.loss, report.eval_outputs, scores.shape) == ("loss", ("y",), (32, nets.CLASSES))
    session.module.train()
    np.testing.assert_array_equal(session.module(x, labels), before)
    session.optimizer.step()
    session.module.eval()
    assert session.module(x, labels)[0] < before


def test_stock_session_options_train_the_same_numbers(tmp_path: Path) -> None:
    write_training_artifacts(nets.quantized_mlp(), Recipe(), tmp_path)
    x, labels = nets.batch()
    loss, _ = stock.gradients(tmp_path, x, labels)
    session = open_session(tmp_path)
    session.module.train()
    assert loss == float(session.module(x, labels))


def test_the_given_model_is_not_changed(tmp_path: Path) -> None:
    net = nets.quantized_mlp()
    tensors = {name: value.const_value for name, value in net.graph.initializers.items()}
    before = ir.to_proto(net).SerializeToString(deterministic=True)
    write_training_artifacts(net, Recipe(), tmp_path)
    assert ir.to_proto(net).SerializeToString(deterministic=True) == before
    assert all(net.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())


def test_fixed_ranges_have_no_trained_scales(tmp_path: Path) -> None:
    report = write_training_artifacts(nets.quantized_mlp(), Recipe(ranges="fixed"), tmp_path)
    assert report.scale_parameters == {}
    assert report.trainable == ("W1", "b1", "W2", "b2")
    constants = {tensor.name for tensor in onnx.load(tmp_path / "training_model.onnx").graph.initializer}
    assert {"x_scale", "W1_scale"} <= constants
    x, labels = nets.batch()
    _, found = stock.gradients(tmp_path, x, labels)
    _, expected = reference_gradients(4, x, labels)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_frozen_prefixes_end_at_boundaries_and_cover_scales(tmp_path: Path) -> None:
    net = nets.small_resnet()
    nets.quantize(net, "block.1.weight", IntegerRange.for_weights(8), np.full(6, 0.01), 0, axis=0)
    nets.quantize(net, "stem.weight", IntegerRange.for_weights(8), np.full(6, 0.01), 0, axis=0)
    report = write_training_artifacts(net, Recipe(frozen=("block",)), tmp_path)
    frozen = {"block.1.weight", "block.1.bias", "block.2.weight", "block.1.weight_scale"}
    assert set(report.frozen) == frozen
    assert "stem.weight_scale" in report.scale_parameters
    for prefix in ("bloc", "nothing"):
        with pytest.raises(QatError) as caught:
            write_training_artifacts(net, Recipe(frozen=("stem", prefix)), tmp_path)
        assert (caught.value.code, caught.value.field) == (ErrorCode.RECIPE_SCOPE_UNMATCHED, "frozen.1")


def test_a_quantizer_behind_the_loss_is_not_trained_and_not_run_in_training(tmp_path: Path) -> None:
    net = nets.quantized_mlp()
    graph = net.graph
    scores = graph.outputs[0]
    softmax = ir.node("Softmax", [scores], {"axis": 1}, name="softmax")
    probabilities = softmax.outputs[0]
    probabilities.name, probabilities.shape, probabilities.type = "p", scores.shape, scores.type
    graph.append(softmax)
    nets.quantize(net, "p", IntegerRange(0, 255), np.float32(1 / 255), 0)
    graph.outputs[:] = [next(iter(probabilities.consumers())).outputs[0]]

    report = write_training_artifacts(net, Recipe(), tmp_path)

    assert (report.attached_to, report.output) == ("y", "p_fake_quantized")
    assert "p_scale" in report.frozen
    assert "Softmax" not in {n.op_type for n in onnx.load(tmp_path / "training_model.onnx").graph.node}
    session = open_session(tmp_path)
    session.module.eval()
    _, found = session.module(*nets.batch())
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=0.01)


def test_pairs_on_the_grid_are_left_out(tmp_path: Path) -> None:
    net = nets.quantized_mlp()
    write_training_artifacts(net, Recipe(), tmp_path)
    plain = len(onnx.load(tmp_path / "training_model.onnx").graph.node)
    first = next(n for n in net.graph if n.name == "x_fake_quantize")
    again = ir.node(
        first.op_type,
        [first.outputs[0], *first.inputs[1:]],
        {"qmin": 0, "qmax": 15, "on_grid": 1},
        domain=first.domain,
        name="again",
    )
    again.outputs[0].name, again.outputs[0].type = "x_again", first.outputs[0].type
    first.outputs[0].replace_all_uses_with(again.outputs[0])
    again.replace_input_with(0, first.outputs[0])
    net.graph.insert_after(first, again)
    write_training_artifacts(net, Recipe(), tmp_path)
    assert len(onnx.load(tmp_path / "training_model.onnx").graph.node) == plain


@pytest.mark.parametrize("name", ["x_grad", "x_grad.accumulation.buffer", "lazy_reset_grad"])
def test_input_names_that_the_training_api_reserves_are_refused(tmp_path: Path, name: str) -> None:
    net = nets.mlp()
    net.graph.inputs[0].name = name
    with pytest.raises(QatError, match="rename") as caught:
        write_training_artifacts(net, Recipe(), tmp_path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.MODEL_INVALID, name)


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    net = nets.model([nets.node("Relu", ["x"], "y")], {}, {"y": ["N", nets.FEATURES]})
    with pytest.raises(QatError) as caught:
        write_training_artifacts(net, Recipe(), tmp_path)
    assert caught.value.code == ErrorCode.NOTHING_TO_TRAIN


_IN_ANOTHER_PROCESS = """
import hashlib, json, pathlib, sys
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.runtime import open_session
from tests.rewriter.training import nets
folder = pathlib.Path(sys.argv[1])
write_training_artifacts(nets.quantized_mlp(), Recipe(), folder)
session = open_session(folder)
session.module.train()
session.module(*nets.batch())
session.optimizer.step()
digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
print(json.dumps([digests, [name for name in ("torch", "onnxruntime.training") if name in sys.modules]]))
"""


def test_the_same_input_gives_the_same_bytes_in_any_process_and_needs_no_pytorch(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    write_training_artifacts(nets.quantized_mlp(), Recipe(), ours)
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(theirs)], capture_output=True, text=True, check=True
    )
    digests, packages = json.loads(done.stdout)
    assert digests == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in ours.iterdir()}
    assert packages == []


def test_a_recipe_that_freezes_everything_is_said(tmp_path: Path) -> None:
    with pytest.raises(QatError, match="frozen") as caught:
        write_training_artifacts(nets.mlp(), Recipe(frozen=("W1", "b1", "W2", "b2")), tmp_path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.NOTHING_TO_TRAIN, "frozen")
