"""Whole models, normalized: what they compute stays, and the form is the one promised."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from normalize_helpers import model, normal, operators, proto, run

from rewriter.errors import ErrorCode, QatError
from rewriter.load import load
from rewriter.normalize import normalize

IMAGES = {
    "mnist-conv": ("Input3", (1, 28, 28)),
    "light-resnet50": ("gpu_0/data_0", (3, 224, 224)),
    "light-densenet121": ("data_0", (3, 224, 224)),
    "light-shufflenet": ("gpu_0/data_0", (3, 224, 224)),
    "light-squeezenet": ("data_0", (3, 224, 224)),
    "qonnx-resblock": ("global_in", (1, 200, 200)),
}


def assert_close_to(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a.astype(np.float64) - b).max() <= 1e-5 * np.abs(b).max()


def assert_normal_form(normalized: ir.Model) -> None:
    graph = normalized.graph
    assert normalized.opset_imports[""] == 18
    assert 8 <= normalized.ir_version <= 10
    assert not {"Constant", "ConstantOfShape", "Dropout", "Sum"} & {
        node.op_type for node in graph if all(v.is_initializer() for v in node.inputs if v is not None)
    }
    names = [node.name for node in graph]
    assert all(names)
    assert len(set(names)) == len(names)
    assert not any(value.is_initializer() for value in graph.inputs)
    assert not any("auto_pad" in node.attributes for node in graph)
    assert all(output.shape is not None for node in graph for output in node.outputs if output.name)
    onnx.checker.check_model(ir.to_proto(normalized))


@pytest.mark.parametrize("name", IMAGES)
def test_image_model_computes_the_same_and_gets_a_dynamic_batch(real_model, name):
    path, (input_name, shape) = real_model(name), IMAGES[name]
    normalized = load(path)
    report = normalize(normalized)

    assert_normal_form(normalized)
    assert report.dynamic_batch == (input_name,)
    assert report.warnings == ()
    assert str(normalized.graph.outputs[0].shape[0]) == "batch"
    images = normal(3, *shape)
    original = onnx.load(path)
    expected = [run(original, {input_name: images[i : i + 1]})[0] for i in range(3)]
    assert_close_to(run(normalized, {input_name: images[:1]}), [expected[0]])
    assert_close_to(run(normalized, {input_name: images}), [np.concatenate(expected)])


def test_ocr_classifier_with_dynamic_size_computes_the_same(real_model):
    path = real_model("ppocr2-cls")
    normalized = load(path)
    report = normalize(normalized)

    assert_normal_form(normalized)
    assert report.source_opset == 11
    assert [str(dim) for dim in normalized.graph.inputs[0].shape] == ["batch", "3", "x_dim_2", "x_dim_3"]
    counts = operators(normalized)
    assert counts["HardSwish"] == 18
    assert "Clip" not in counts
    x = normal(2, 3, 48, 192)
    assert_close_to(run(normalized, {"x": x}), run(onnx.load(path), {"x": x}))


def test_sentence_encoder_computes_the_same(real_model):
    path = real_model("minilm-l3")
    normalized = load(path)
    report = normalize(normalized)

    assert_normal_form(normalized)
    assert report.dynamic_batch == ()
    rng = np.random.default_rng(0)
    mask = np.ones((2, 16), np.int64)
    mask[1, 9:] = 0
    feeds = {"input_ids": rng.integers(0, 1000, (2, 16)), "attention_mask": mask}
    assert_close_to(run(normalized, feeds), run(onnx.load(path), feeds))


def test_mnist_gets_its_biases_and_its_gemm(real_model):
    normalized = load(real_model("mnist-conv"))
    normalize(normalized)
    assert operators(normalized) == {"Conv": 2, "Relu": 2, "MaxPool": 2, "Reshape": 1, "Gemm": 1}
    assert all(len(node.inputs) == 3 for node in normalized.graph if node.op_type == "Conv")


def test_folded_weights_of_the_light_models_are_initializers(real_model):
    normalized = load(real_model("light-squeezenet"))
    normalize(normalized)
    for node in normalized.graph:
        if node.op_type == "Conv":
            assert node.inputs[1].is_initializer()
            assert np.all(node.inputs[1].const_value.numpy() == np.float32(0.02))


def test_normalizing_twice_changes_nothing(real_model):
    normalized = load(real_model("ppocr2-cls"))
    normalize(normalized)
    once = ir.to_proto(normalized).SerializeToString(deterministic=True)
    normalize(normalized)
    assert ir.to_proto(normalized).SerializeToString(deterministic=True) == once


def test_the_same_file_gives_the_same_bytes(real_model):
    results = []
    for _ in range(2):
        normalized = load(real_model("light-squeezenet"))
        normalize(normalized)
        results.append(ir.to_proto(normalized).SerializeToString(deterministic=True))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("weight", "hint"),
    [("double[2] w = {1.0, 2.0}", "float32"), ("float w = {1}", "nothing to train")],
)
def test_a_model_without_float32_weights_is_refused(weight, hint):
    dtype = weight.split("[")[0].split(" ")[0]
    source = model(f"g ({dtype}[N,2] x) => ({dtype}[N,2] y) <{weight}> {{ y = Mul(x, w) }}")
    with pytest.raises(QatError, match=hint) as caught:
        normalize(source)
    assert caught.value.code == ErrorCode.MODEL_NO_FLOAT_WEIGHTS


def test_unnamed_and_duplicate_nodes_get_unique_names():
    source = proto(
        """g (float[N,2] x) => (float[N,2] y) <float[2] w = {1.0, 2.0}> {
             a = Mul(x, w)
             b = Relu(a)
             c = Mul(b, w)
             y = Relu(c)
           }"""
    )
    for node, name in zip(source.graph.node, ("m", "", "m", ""), strict=True):
        node.name = name
    normalized = ir.from_proto(source)
    normalize(normalized)
    names = [node.name for node in normalized.graph]
    assert names[0] == "m"
    assert all(names)
    assert len(set(names)) == 4


def test_a_quantized_model_of_one_sample_gets_a_dynamic_batch_and_keeps_its_quantizers():
    source = model(
        """g (float[1,2,4,4] x) => (float[1,1,4,4] y)
        <float s = {0.1}, uint8 z = {128}, int8[1,2,1,1] w = {3, -5}, float ws = {0.5}, int8 wz = {0}> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            f = DequantizeLinear(w, ws, wz)
            y = Conv(d, f)
        }"""
    )
    report = normalize(source)
    assert report.dynamic_batch == ("x",)
    assert operators(source) == {"FakeQuantize": 2, "Conv": 1}
    assert str(source.graph.outputs[0].shape[0]) == "batch"


def test_weights_inside_branches_only_are_said_to_be_the_reason():
    source = model(
        """g (float[N,2] x, bool c) => (float[N,2] y) {
            y = If (c) <
                then_branch = t () => (float[N,2] a) <float[2] w = {1, 2}> { a = Mul(x, w) },
                else_branch = e () => (float[N,2] b) { b = Relu(x) }
            >
        }"""
    )
    with pytest.raises(QatError, match="inside If"):
        normalize(source)
