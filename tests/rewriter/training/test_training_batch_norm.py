"""Batch norm in training, folded and on its own: it is BatchNormalization, before the freeze and after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import rewriter
from rewriter import inference
from rewriter.errors import ErrorCode, QatError
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.fold.report import FoldReport
from rewriter.normalize import normalize
from rewriter.recipe import Override, Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.runtime import open_session
from tests.rewriter.training import stock

IMAGE = (3, 13, 11)
CLASSES = 4
STATISTICS = ("quantized_layer", "float_layer")


class Net:
    """Layers in a row; `bn` after a layer, random parameters, statistics that are not those of the data."""

    def __init__(self, shape: tuple[int, ...] = IMAGE, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[object] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.last = "x"

    def weight(self, name: str, *shape: int) -> str:
        fan_in = np.prod(shape[1:])
        self.initializers[name] = (self.random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        return name

    def op(self, op_type: str, name: str, *inputs: str, **attributes: object) -> Net:
        self.nodes.append(helper.make_node(op_type, [self.last, *inputs], [name], name=name, **attributes))
        self.last = name
        return self

    def bn(self, name: str, channels: int, **attributes: float) -> Net:
        random = self.random
        gamma = random.uniform(0.5, 1.5, channels) * random.choice([-1, 1], channels)
        values = (
            gamma,
            random.uniform(-0.5, 0.5, channels),
            random.uniform(-0.2, 0.2, channels),
            random.uniform(0.5, 2.0, channels),
        )
        roles = ("gamma", "beta", "mean", "var")
        for role, value in zip(roles, values, strict=True):
            self.initializers[f"{name}.{role}"] = value.astype(np.float32)
        return self.op("BatchNormalization", name, *(f"{name}.{role}" for role in roles), **attributes)

    def model(self, classes: int = CLASSES) -> ir.Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.shape])],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["N", classes])],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        model = ir.from_proto(proto)
        normalize(model)
        return model


def separable_net() -> Net:
    """Depthwise separable, with strides, dilation, groups, asymmetric pads, a bias, and a matrix product."""
    net = Net()
    net.op("Conv", "c1", net.weight("c1.w", 8, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    net.bn("b1", 8, momentum=0.8, epsilon=1e-3).op("Relu", "r1")
    net.op("Conv", "c2", net.weight("c2.w", 8, 1, 3, 3), group=8, dilations=[2, 2], pads=[2, 2, 2, 2])
    net.bn("b2", 8).op("Relu", "r2")
    net.op("Conv", "c3", net.weight("c3.w", 12, 8, 1, 1), net.weight("c3.b", 12)).bn("b3", 12)
    net.op("Relu", "r3")
    net.op("Conv", "c4", net.weight("c4.w", 6, 6, 3, 2), group=2, pads=[1, 0, 0, 1]).bn("b4", 6)
    net.op("Relu", "r4").op("GlobalAveragePool", "p").op("Flatten", "f", axis=1)
    net.op("Gemm", "g", net.weight("g.w", 5, 6), transB=1).bn("b5", 5).op("Relu", "r5")
    return net.op("Gemm", "y", net.weight("y.w", 5, CLASSES), net.weight("y.b", CLASSES))


def batch(shape: tuple[int, ...] = IMAGE, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, 16)
    return random.standard_normal((16, *shape)).astype(np.float32), labels


@dataclasses.dataclass
class Step:
    """What one training step computed: the loss, gradients by parameter, state after it."""

    loss: float
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


class Training:
    """Steps without an optimizer on artifacts without quantizers."""

    def __init__(self, net: Net, folder: Path, **settings: object) -> None:
        folder.mkdir()
        model = net.model()
        recipe = Recipe(**settings)  # type: ignore[arg-type]
        self.folding: FoldReport = fold_batch_norms(model, recipe)
        self.report = write_training_artifacts(model, recipe, folder, folding=self.folding)
        self._session = open_session(folder)

    def step(self, *feeds: np.ndarray) -> Step:
        module, parameters = self._session.module, self._session.state.parameters
        module.train()
        loss = float(module(*feeds))
        found = {name: np.array(p.grad) for name, p in parameters if p.requires_grad}
        state = {name: np.array(p.data) for name, p in parameters if not p.requires_grad}
        module.lazy_reset_grad()
        return Step(loss, found, state)

    def evaluate(self, *feeds: np.ndarray) -> tuple[float, np.ndarray]:
        self._session.module.eval()
        loss, outputs = self._session.module(*feeds)
        return float(loss), np.array(outputs)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], names: set[str]) -> None:
    assert names
    for name in names:
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-4, atol=1e-4 * max(size, 1e-3), err_msg=name
        )


def trained_names(net: Net) -> set[str]:
    """Without the bias before a batch norm: it cancels."""
    return {name for name in net.initializers if not name.endswith((".mean", ".var")) and name != "c3.b"}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_before_the_freeze_it_is_plain_batch_normalization(tmp_path: Path, statistics: str) -> None:
    """Against generate_artifacts, which has onnxruntime's own kernels normalize and differentiate."""
    net = separable_net()
    names = trained_names(net)
    (tmp_path / "stock").mkdir()
    running = [name for name in net.initializers if name.endswith((".mean", ".var"))]
    plain = net.model()
    stock.generate_artifacts(plain, tmp_path / "stock", trainable=sorted(names), frozen=[*running, "c3.b"])
    x, labels = batch()
    loss, expected = stock.gradients(tmp_path / "stock", x, labels)
    training = Training(net, tmp_path / "ours", fold_statistics=statistics)
    assert len(training.folding.folded) == 5
    step = training.step(x, labels)
    np.testing.assert_allclose(step.loss, loss, rtol=1e-5)
    assert_same(step.gradients, expected, names)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_running_statistics_are_those_of_the_float_layer(tmp_path: Path, statistics: str) -> None:
    """With ONNX's momentum and the population's variance, against the same batch norms left unfolded."""
    net = separable_net()
    folded = Training(net, tmp_path / "fold", fold_statistics=statistics)
    kept = Training(net, tmp_path / "keep", batch_norm="keep")
    assert (len(kept.folding.folded), len(kept.folding.trained)) == (0, 5)
    for seed in range(3):
        feeds = batch(seed=seed)
        found, expected = folded.step(*feeds), kept.step(*feeds)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        shift = {"b3.mean": net.initializers["c3.b"]}  # the bias before it lives in the mean
        for name in (n for n in expected.state if n.endswith((".mean", ".var"))):
            np.testing.assert_allclose(
                found.state[name] + shift.get(name, 0), expected.state[name], rtol=1e-4, atol=1e-6
            )
    np.testing.assert_allclose(folded.evaluate(*feeds)[1], kept.evaluate(*feeds)[1], rtol=1e-4, atol=1e-5)


def test_a_batch_norm_on_its_own_updates_as_onnx_says(tmp_path: Path) -> None:
    net = Net((5, 6))
    net.op("Relu", "r").bn("b", 5, momentum=0.7).op("Flatten", "f", axis=1)
    net.op("Gemm", "y", net.weight("y.w", 30, CLASSES))
    training = Training(net, tmp_path / "t")
    assert [(one.node, one.reason) for one in training.folding.trained] == [
        ("b", "the operator before it is Relu 'r', not a layer")
    ]
    x, labels = batch((5, 6))
    state = training.step(x, labels).state
    u = np.maximum(x, 0).astype(np.float64)
    for name, value in (("b.mean", u.mean((0, 2))), ("b.var", u.var((0, 2)))):
        expected = 0.7 * net.initializers[name] + 0.3 * value
        np.testing.assert_allclose(state[name], expected, rtol=1e-5)


@pytest.mark.parametrize("mode", [*STATISTICS, "keep"])
def test_after_the_freeze_it_is_inference_batch_normalization(tmp_path: Path, mode: str) -> None:
    """Against batch norms with the statistics of that moment as constants; they no longer change."""
    net = separable_net()
    settings = {"batch_norm": "keep"} if mode == "keep" else {"fold_statistics": mode}
    training = Training(net, tmp_path / "ours", freeze_bn_delay=3, **settings)
    for seed in (1, 2):
        before = training.step(*batch(seed=seed))
    x, labels = batch(seed=3)
    step = training.step(x, labels)
    running = {name for name in net.initializers if name.endswith((".mean", ".var"))}
    for name in running:
        np.testing.assert_array_equal(step.state[name], before.state[name])
        net.initializers[name] = step.state[name].copy()
    if mode != "keep":
        net.initializers["b3.mean"] += net.initializers["c3.b"]
    inference = Training(net, tmp_path / "inference", batch_norm="keep", freeze_bn_delay=0)
    expected = inference.step(x, labels)
    np.testing.assert_allclose(step.loss, expected.loss, rtol=1e-5)
    assert_same(step.gradients, expected.gradients, trained_names(net))
    loss, _ = training.evaluate(x, labels)
    np.testing.assert_allclose(step.loss, loss, rtol=1e-5)


@pytest.mark.parametrize("delay", [0, 1])
def test_frozen_from_the_first_step(tmp_path: Path, delay: int) -> None:
    net = separable_net()
    training = Training(net, tmp_path / "t", freeze_bn_delay=delay)
    feeds = batch()
    evaluated, _ = training.evaluate(*feeds)
    np.testing.assert_allclose(training.step(*feeds).loss, evaluated, rtol=1e-6)
    np.testing.assert_array_equal(training.step(*feeds).state["b1.var"], net.initializers["b1.var"])


def _transposed(group: int) -> Net:
    net = Net()
    net.op("Conv", "c0", net.weight("c0.w", 4, 3, 3, 3), strides=[2, 2])
    net.op(
        "ConvTranspose",
        "c1",
        net.weight("c1.w", 4, 6 // group, 3, 3),
        net.weight("c1.b", 6),
        strides=[2, 2],
        group=group,
    )
    return _pooled(net.bn("b1", 6), 6)


def _one_dimensional() -> Net:
    net = Net((4, 20))
    net.op("Conv", "c1", net.weight("c1.w", 6, 2, 3), group=2, strides=[2])
    return _pooled(net.bn("b1", 6), 6)


def _pooled(net: Net, channels: int) -> Net:
    net.op("Relu", "r").op("GlobalAveragePool", "p").op("Flatten", "f", axis=1)
    return net.op("Gemm", "y", net.weight("y.w", channels, CLASSES))


def _matrix_product() -> Net:
    net = Net((7,))
    net.op("MatMul", "c1", net.weight("c1.w", 7, 6)).bn("b1", 6).op("Relu", "r")
    return net.op("MatMul", "y", net.weight("y.w", 6, CLASSES))


def _matrix_product_from_the_left() -> Net:
    net = Net((7, 5))
    weight = net.weight("c1.w", 6, 7)
    net.nodes.append(helper.make_node("MatMul", [weight, net.last], ["c1"], name="c1"))
    net.last = "c1"
    net.bn("b1", 6).op("Relu", "r").op("Flatten", "f", axis=1)
    return net.op("Gemm", "y", net.weight("y.w", 30, CLASSES))


def _gemm_with_alpha() -> Net:
    net = Net((7,))
    net.op("Gemm", "c1", net.weight("c1.w", 7, 6), net.weight("c1.b", 6), alpha=0.5, beta=2.0)
    net.bn("b1", 6).op("Relu", "r")
    return net.op("Gemm", "y", net.weight("y.w", 6, CLASSES))


LAYERS = {
    "transposed convolution": lambda: _transposed(1),
    "grouped transposed convolution": lambda: _transposed(2),
    "grouped 1-D convolution": _one_dimensional,
    "matrix product": _matrix_product,
    "matrix product, weight on the left": _matrix_product_from_the_left,
    "Gemm with alpha and beta": _gemm_with_alpha,
}


@pytest.mark.parametrize("freeze", [None, 2])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_folds_into_what_it_is_unfolded(
    tmp_path: Path, layer: str, statistics: str, freeze: int | None
) -> None:
    net = LAYERS[layer]()
    folded = Training(net, tmp_path / "fold", fold_statistics=statistics, freeze_bn_delay=freeze)
    kept = Training(net, tmp_path / "keep", batch_norm="keep", freeze_bn_delay=freeze)
    assert [one.batch_norm for one in folded.folding.folded] == ["b1"]
    names = {name for name in kept.report.trainable if not name.endswith(".b")}
    for seed in range(3):
        feeds = batch(net.shape, seed)
        found, expected = folded.step(*feeds), kept.step(*feeds)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        assert_same(found.gradients, expected.gradients, names)
    np.testing.assert_allclose(folded.evaluate(*feeds)[1], kept.evaluate(*feeds)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_channel_that_gamma_switched_off_is_beta_and_comes_back(tmp_path: Path, statistics: str) -> None:
    net = separable_net()
    net.initializers["b1.gamma"][2] = 0
    training = Training(net, tmp_path / "t", fold_statistics=statistics)
    kept = Training(net, tmp_path / "k", batch_norm="keep")
    feeds = batch()
    found, expected = training.step(*feeds), kept.step(*feeds)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    assert all(np.isfinite(values).all() for values in (*found.gradients.values(), *found.state.values()))
    assert found.gradients["b1.gamma"][2] != 0


def test_one_module_called_twice_shares_its_weight_and_updates_its_statistics_twice(tmp_path: Path) -> None:
    net = Net((4,))
    net.weight("w", 4, 4)
    parameters = ("gamma", "beta", "mean", "var")
    net.op("Gemm", "c1", "w").bn("b", 4).op("Relu", "r1")
    net.op("Gemm", "c2", "w").op("BatchNormalization", "b2", *(f"b.{p}" for p in parameters))
    net.op("Gemm", "y", net.weight("y.w", 4, CLASSES))
    folded, kept = Training(net, tmp_path / "f"), Training(net, tmp_path / "k", batch_norm="keep")
    assert len({one.training.weight for one in folded.folding.folded}) == 1
    assert {"b.mean", "b.var"} < set(folded.report.state)
    for seed in range(2):
        feeds = batch((4,), seed)
        found, expected = folded.step(*feeds), kept.step(*feeds)
        assert_same(found.gradients, expected.gradients, {"w", "b.gamma", "b.beta", "y.w"})
        for name in ("b.mean", "b.var"):
            np.testing.assert_allclose(found.state[name], expected.state[name], rtol=1e-4, atol=1e-6)


def test_batch_norms_that_share_single_tensors_get_copies(tmp_path: Path) -> None:
    """Exporters merge equal constants: two fresh batch norms read the same zeros and ones."""
    net = Net((6,))
    net.initializers |= {"zeros": np.zeros(6, np.float32), "ones": np.ones(6, np.float32)}
    same = ("ones", "zeros", "zeros", "ones")
    for name in ("1", "2"):
        net.op("Gemm", f"c{name}", net.weight(f"w{name}", 6, 6))
        net.op("BatchNormalization", f"b{name}", *same).op("Relu", f"r{name}")
    net.op("Gemm", "y", net.weight("y.w", 6, CLASSES))
    training = Training(net, tmp_path / "t")
    tensors = [dataclasses.astuple(one.training.tensors) for one in training.folding.folded]
    # They read other weights: these are two modules.
    assert len({*tensors[0], *tensors[1]}) == 8
    assert {*tensors[0], *tensors[1]} <= {*training.report.trainable, *training.report.state}
    assert not {"ones", "zeros"} & {*training.report.trainable, *training.report.frozen}


def test_what_is_outside_the_scope_keeps_its_running_statistics(tmp_path: Path) -> None:
    net = separable_net()
    for node in net.nodes:
        node.name = f"{'head' if node.name in ('g', 'b5') else 'body'}/{node.name}"  # type: ignore[attr-defined]
    training = Training(net, tmp_path / "t", scope="body")
    assert [one.batch_norm for one in training.folding.folded] == [f"body/b{i}" for i in (1, 2, 3, 4)]
    assert [(one.node, one.reason) for one in training.folding.left] == [
        ("head/b5", "outside the recipe's scope 'body'")
    ]
    assert not {"b5.mean", "b5.var"} & set(training.report.state)
    feeds = batch()
    found = training.step(*feeds)
    assert "b5.gamma" in found.gradients
    assert training.step(*feeds).loss == pytest.approx(found.loss, rel=1e-3)  # nothing but statistics moved


def test_overrides_choose_per_node(tmp_path: Path) -> None:
    overrides = (
        Override(match="b1", batch_norm="keep"),
        Override(match="c2", batch_norm="fold_inference"),
        Override(match="b3", freeze_bn_delay=7),
    )
    training = Training(separable_net(), tmp_path / "t", overrides=overrides)
    assert [one.node for one in training.folding.trained] == ["b1"]
    modes = {one.batch_norm: one.training for one in training.folding.folded}
    assert modes["b2"] is None
    assert modes["b3"].freeze_bn_delay == 7
    assert modes["b4"].freeze_bn_delay is None


def test_a_batch_norm_exported_in_training_mode_trains_like_the_others(tmp_path: Path) -> None:
    net = separable_net()
    node = next(n for n in net.nodes if n.name == "b2")  # type: ignore[attr-defined]
    node.output.extend(["new_mean", "new_var"])  # type: ignore[attr-defined]
    node.attribute.append(helper.make_attribute("training_mode", 1))  # type: ignore[attr-defined]
    training = Training(net, tmp_path / "t")
    assert (training.folding.found, training.folding.training_mode) == (5, ("b2",))
    assert len(training.folding.folded) == 5
    plain = Training(separable_net(), tmp_path / "p")
    feeds = batch()
    assert training.step(*feeds).loss == plain.step(*feeds).loss


# --- Names, types and bodies: what must not mix. ---


@pytest.mark.parametrize("role", ["gamma", "beta", "mean", "var", "weight"])
@pytest.mark.parametrize("suffix", ["scale", "zero_point"])
def test_no_quantizer_takes_the_name_of_what_was_folded(tmp_path: Path, role: str, suffix: str) -> None:
    """Nor does the untrained bundle compute anything else than the float model."""
    taken = f"w2_{suffix}"
    net = Net()
    net.op("Conv", "c1", net.weight("w1", 4, 3, 3, 3)).bn("b1", 4).op("Relu", "r1")
    net.op("Conv", "c2", net.weight("w2", 4, 4, 3, 3)).op("Relu", "r2").op("GlobalAveragePool", "p")
    net.op("Flatten", "y", axis=1)
    old = "w1" if role == "weight" else f"b1.{role}"
    net.initializers[taken] = net.initializers.pop(old)
    for node in net.nodes:
        for index, name in enumerate(node.input):  # type: ignore[attr-defined]
            if name == old:
                node.input[index] = taken  # type: ignore[attr-defined]
    onnx.save(ir.to_proto(net.model()), tmp_path / "net.onnx")
    x, labels = batch()
    np.savez(tmp_path / "x.npz", x=x)
    for ranges in ("learned", "fixed"):
        rewriter.prepare(
            tmp_path / "net.onnx",
            tmp_path / "bundle",
            recipe=Recipe(ranges=ranges),  # type: ignore[arg-type]
            calibration=tmp_path / "x.npz",
            replace=True,
        )
        session = open_session(tmp_path / "bundle")
        session.module.eval()
        _, found = session.module(x, labels)
        (expected,) = inference.run(inference.open_session(tmp_path / "net.onnx"), ["y"], {"x": x})
        np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


def test_the_body_of_an_if_may_read_a_quantized_tensor(tmp_path: Path) -> None:
    net = Net()
    net.op("Conv", "c1", net.weight("w1", 4, 3, 3, 3)).bn("b1", 4)
    shape = ["N", 4, 11, 9]
    bodies = {
        f"{branch}_branch": helper.make_graph(
            [helper.make_node(op, ["b1"], [branch], name=f"{branch}/{op}")],
            branch,
            [],
            [helper.make_tensor_value_info(branch, TensorProto.FLOAT, shape)],
        )
        for branch, op in (("then", "Sigmoid"), ("else", "Tanh"))
    }
    net.initializers["yes"] = np.array(True)
    net.nodes.append(helper.make_node("If", ["yes"], ["i"], name="if", **bodies))
    net.last = "b1"
    net.op("Relu", "r").op("GlobalAveragePool", "p").op("Flatten", "f", axis=1)
    net.op("Gemm", "g", net.weight("w2", 4, CLASSES))
    net.nodes.append(helper.make_node("ReduceMean", ["i"], ["m"], name="m", keepdims=0))
    net.op("Add", "y", "m")
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *IMAGE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in net.initializers.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "net.onnx",
    )
    for ranges in ("learned", "moving_average"):
        recipe = Recipe(ranges=ranges)  # type: ignore[arg-type]
        rewriter.prepare(tmp_path / "net.onnx", tmp_path / "bundle", recipe=recipe, replace=True)
        rewriter.finalize(tmp_path / "bundle", tmp_path / "int8.onnx")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("mode", ["fold_training", "keep"])
def test_a_batch_norm_that_is_not_float32_is_left_with_the_reason(
    tmp_path: Path, dtype: type, mode: str
) -> None:
    to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    net = Net()
    net.op("Conv", "c1", net.weight("w1", 4, 3, 3, 3)).bn("b0", 4).op("Cast", "low", to=to)
    net.bn("b1", 4).op("Cast", "back", to=TensorProto.FLOAT)
    for name in ("b1.gamma", "b1.beta", "b1.mean", "b1.var"):
        net.initializers[name] = net.initializers[name].astype(dtype)
    training = Training(_pooled(net, 4), tmp_path / "t", batch_norm=mode)
    (left,) = training.folding.left
    assert left.node == "b1"
    assert "not float32 throughout" in left.reason
    assert np.isfinite(training.step(*batch()).loss)


def test_in_training_mode_where_the_model_reads_the_new_statistics_it_stays_and_is_named(
    tmp_path: Path,
) -> None:
    net = separable_net()
    node = next(n for n in net.nodes if n.name == "b5")  # type: ignore[attr-defined]
    node.output.extend(["new_mean", "new_var"])  # type: ignore[attr-defined]
    node.attribute.append(helper.make_attribute("training_mode", 1))  # type: ignore[attr-defined]
    model = net.model()
    graph = ir.to_proto(model).graph
    graph.output.append(helper.make_tensor_value_info("new_mean", TensorProto.FLOAT, [5]))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(proto, tmp_path / "net.onnx")
    manifest = rewriter.prepare(tmp_path / "net.onnx", tmp_path / "bundle")
    assert "but for 1 that normalize(s) with every batch" in manifest.batch_norms.note
    assert any("'b5' left in training mode" in warning for warning in manifest.warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": ("b1.mean",)}, "updated by the training graph"),
        ({"frozen": ("x_scale",), "ranges": "moving_average"}, "updated by the training graph"),
        ({"frozen": ("c1.w_folded",)}, "No parameter is called"),
    ],
    ids=["running mean", "tracked scale", "computed weight"],
)
def test_frozen_names_what_training_could_change(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    onnx.save(ir.to_proto(separable_net().model()), tmp_path / "net.onnx")
    with pytest.raises(QatError, match=message) as caught:
        rewriter.prepare(tmp_path / "net.onnx", tmp_path / "bundle", recipe=Recipe(**settings))  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.field) == (ErrorCode.RECIPE_SCOPE_UNMATCHED, "frozen.0")


def test_frozen_covers_what_was_folded(tmp_path: Path) -> None:
    training = Training(separable_net(), tmp_path / "t", frozen=("b1", "c2.w"))
    assert not {"b1.gamma", "b1.beta", "c2.w"} & set(training.report.trainable)
    assert {"b1.gamma", "b1.beta", "c2.w"} <= set(training.report.frozen)
    assert "b2.gamma" in training.report.trainable


def test_a_channel_that_rounds_to_0_keeps_its_running_statistics(tmp_path: Path) -> None:
    """One scale for the whole weight, and a gamma that is nothing beside the others."""
    net = separable_net()
    net.initializers["b1.gamma"][:] = 1
    net.initializers["b1.gamma"][3] = 1e-4
    onnx.save(ir.to_proto(net.model()), tmp_path / "net.onnx")
    recipe = Recipe(per_channel=False, weight_bits=4)
    rewriter.prepare(tmp_path / "net.onnx", tmp_path / "bundle", recipe=recipe)
    session = open_session(tmp_path / "bundle")
    session.module.train()
    for seed in range(3):
        session.module(*batch(seed=seed))
    variance = np.array(session.state.parameters["b1.var"].data)
    moved = variance != net.initializers["b1.var"]
    assert moved.tolist() == [channel != 3 for channel in range(8)]
