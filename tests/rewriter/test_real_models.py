"""The whole path on real models: what is quantized, that stock onnxruntime-training trains it, the result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import rewriter
from rewriter import Manifest
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.load import load
from rewriter.normalize import normalize
from tests.rewriter.graphs import run

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def train(bundle: Path, feeds: list[np.ndarray], steps: int) -> list[float]:
    """Losses of `steps` steps on one batch, in stock onnxruntime-training; the checkpoint is saved."""
    api = rewriter.training_api()
    state = api.CheckpointState.load_checkpoint(bundle / "checkpoint")
    module = api.Module(bundle / "training_model.onnx", state, bundle / "eval_model.onnx", device="cpu")
    optimizer = api.Optimizer(bundle / "optimizer_model.onnx", module)
    losses = []
    for _ in range(steps):
        module.train()
        losses.append(float(module(*feeds)))
        optimizer.step()
        module.lazy_reset_grad()
    assert all(np.isfinite(parameter.data).all() for _, parameter in state.parameters)
    api.CheckpointState.save_checkpoint(state, bundle / "trained_checkpoint")
    return losses


def original_layers(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node if n.op_type in LAYERS)


def accounted_layers(bundle: Path, manifest: Manifest) -> Counter[str]:
    """Layers of the QAT model that are quantized, or skipped with a reason."""
    listed = set(manifest.quantized_nodes) | {one.node for one in manifest.skipped if one.reason}
    nodes = onnx.load(bundle / "qat_model.onnx").graph.node
    layers = [node for node in nodes if node.op_type in LAYERS]
    assert {node.name for node in layers} <= listed
    return Counter(node.op_type for node in layers)


@pytest.fixture(scope="module")
def text_angle(tmp_path_factory: pytest.TempPathFactory, real_model: Callable[[str], Path]) -> Path:
    """ppocr2-cls prepared with 16 random images of 48 x 192 pixels."""
    folder = tmp_path_factory.mktemp("ppocr2-cls")
    images = np.random.default_rng(0).standard_normal((16, 3, 48, 192)).astype(np.float32)
    np.savez(folder / "samples.npz", x=images)
    rewriter.prepare(real_model("ppocr2-cls"), folder / "bundle", calibration=folder / "samples.npz")
    return folder


class TestTextAngle:
    """ppocr2-cls: 53 convolutions, 35 of them with batch norm, squeeze-and-excitation, hard swish."""

    def test_every_batch_norm_is_folded_and_every_layer_accounted_for(self, text_angle, real_model):
        manifest = rewriter.read_manifest(text_angle / "bundle")
        assert len(manifest.folded) == 35
        assert original_layers(real_model("ppocr2-cls")) == {"Conv": 53, "MatMul": 1}
        assert accounted_layers(text_angle / "bundle", manifest) == {"Conv": 53, "Gemm": 1}

    def test_the_loss_falls_on_random_labels(self, text_angle):
        rng = np.random.default_rng(1)
        feeds = [rng.standard_normal((8, 3, 48, 192)).astype(np.float32), rng.integers(0, 2, 8)]
        losses = train(text_angle / "bundle", feeds, steps=40)  # noise is not what its statistics are of
        assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])

    def test_the_trained_int8_model_runs_in_integers_and_agrees(self, text_angle):
        report = rewriter.finalize(
            text_angle / "bundle", text_angle / "int8.onnx", verify=text_angle / "samples.npz"
        )
        assert report.layer_kernels == {"QGemm": 1, "QLinearConv": 53}
        assert report.agreement is not None
        assert report.agreement.top1_without_saturation is not None
        assert report.agreement.top1_without_saturation >= 0.995
        assert report.agreement.largest_difference == 0

    def test_the_int8_model_computes_what_the_eval_model_does(self, text_angle):
        """To the last bit, optimizations off: what was trained is what runs."""
        images = np.load(text_angle / "samples.npz")["x"]
        api = rewriter.training_api()
        state = api.CheckpointState.load_checkpoint(text_angle / "bundle" / "trained_checkpoint")
        bundle = text_angle / "bundle"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        module = api.Module(
            bundle / "training_model.onnx", state, bundle / "eval_model.onnx", "cpu", session_options=options
        )
        module.eval()
        _loss, expected = module(images, np.zeros(len(images), np.int64))
        session = onnxruntime.InferenceSession(text_angle / "int8.onnx", options)
        actual = session.run(None, {"x": images})[0]
        np.testing.assert_array_equal(actual, expected)

    def test_the_same_input_gives_the_same_bytes(self, text_angle, real_model):
        again = text_angle / "again"
        rewriter.prepare(real_model("ppocr2-cls"), again, calibration=text_angle / "samples.npz")
        for path in again.iterdir():
            assert path.read_bytes() == (text_angle / "bundle" / path.name).read_bytes(), path.name


CNNS = {
    # model -> (input, layers, batch norms folded)
    "light-resnet50": ("gpu_0/data_0", {"Conv": 53, "Gemm": 1}, 53),
    "light-shufflenet": ("gpu_0/data_0", {"Conv": 49, "Gemm": 1}, 49),
    "light-densenet121": ("data_0", {"Conv": 121}, 59),
}


@pytest.mark.parametrize("name", CNNS)
def test_image_classifiers_train_and_every_layer_is_accounted_for(name, real_model, tmp_path):
    input_name, layers, folded = CNNS[name]
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 3, 224, 224)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", **{input_name: images})
    bundle = tmp_path / "bundle"
    manifest = rewriter.prepare(real_model(name), bundle, calibration=tmp_path / "samples.npz")
    assert len(manifest.folded) == folded
    assert accounted_layers(bundle, manifest) == layers == original_layers(real_model(name))
    assert input_name in manifest.normalization.dynamic_batch
    losses = train(bundle, [images, np.array([1, 2])], steps=2)
    assert losses[0] == pytest.approx(np.log(1000), rel=0.2)  # all weights are equal: every class is
    assert losses[1] < losses[0] * 1.001


def test_densenet_computes_the_same_after_folding(real_model):
    """Batch norms before the convolution stay, those behind one are folded; weights random, not all 0.02."""
    model = load(real_model("light-densenet121"))
    normalize(model)
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32 and array.ndim:
            fan_in = max(array[0].size, 1) if array.ndim > 1 else 1
            scaled = rng.uniform(0.5, 1.5, array.shape) if fan_in == 1 else rng.standard_normal(array.shape)
            value.const_value = ir.tensor((scaled * np.sqrt(2 / fan_in)).astype(np.float32), name=value.name)
    image = rng.standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = run(model, data_0=image)[0]
    report = fold_batch_norms(model)
    assert (len(report.folded), len(report.left)) == (59, 62)
    actual = run(model, data_0=image)[0]
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_transformer_trains_with_dynamic_batch_and_sequence(real_model, tmp_path):
    bundle = tmp_path / "bundle"
    manifest = rewriter.prepare(real_model("minilm-l3"), bundle)
    graph = onnx.load(bundle / "qat_model.onnx").graph
    constants = {i.name for i in graph.initializer}
    quantized = {t.tensor for q in manifest.quantizers if q.kind == "weight" for t in q.tensors}
    matrix_products = {node.name for node in graph.node if node.op_type == "MatMul"}
    with_weight = {n for q in manifest.quantizers if q.kind == "weight" for n in q.nodes}
    assert len(with_weight & matrix_products) == 18
    assert quantized <= constants
    accounted_layers(bundle, manifest)

    assert manifest.training.target is not None
    rng = np.random.default_rng(0)
    for batch, sequence in ((2, 5), (3, 9)):
        ids = rng.integers(0, 1000, (batch, sequence))
        feeds = [ids, np.ones_like(ids), rng.integers(0, 384, (batch, sequence))]
        losses = train(bundle, feeds, steps=2)
        assert losses[1] < losses[0]


def test_the_manifest_is_readable_json_with_the_documented_sections(text_angle):
    manifest = json.loads((text_angle / "bundle" / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    assert {
        "recipe",
        "source",
        "versions",
        "quantizers",
        "folded",
        "skipped",
        "frozen",
        "warnings",
        "files",
    } <= set(manifest)
    first = manifest["quantizers"][0]
    assert {"name", "tensor", "kind", "bits", "symmetric", "axis", "scale", "scale_parameter"} <= set(first)
    assert {"initial_scale", "initialized", "nodes"} <= set(first)
