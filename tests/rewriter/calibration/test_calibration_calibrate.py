"""rewriter/calibration: ranges from samples, against NumPy on the raw activations of a plain session run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from rewriter import fake_quantize
from rewriter.calibration import NpzSamples, calibrate
from rewriter.calibration.bias import LARGEST_BIAS
from rewriter.errors import ErrorCode, QatError
from rewriter.quantization import (
    IntegerRange,
    Plan,
    QuantizedTensor,
    Quantizer,
    QuantizerParameters,
    dequantize,
    parameters_from_range,
    quantize,
)
from rewriter.recipe import Recipe

COUNT = 13


def activation(
    *tensors: str | QuantizedTensor, bits: int = 8, symmetric: bool = False, existing: bool = False
) -> Quantizer:
    quantized = tuple(QuantizedTensor(t, ()) if isinstance(t, str) else t for t in tensors)
    range_ = IntegerRange.for_activations(bits, symmetric=symmetric)
    name = quantized[0].name
    return Quantizer(name, "activation", bits, range_, symmetric, None, quantized, existing=existing)


def weight(name: str, *consumers: str, bits: int = 8, axis: int | None = 0) -> Quantizer:
    tensors = (QuantizedTensor(name, consumers),)
    return Quantizer(name, "weight", bits, IntegerRange.for_weights(bits), True, axis, tensors)


def plan(*quantizers: Quantizer) -> Plan:
    return Plan(quantizers, (), ())


def recipe(method: str = "minmax") -> Recipe:
    return Recipe.parse({"calibration": {"method": method}})


MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[N, 3, 12, 12] x) => (float[N, 4, 10, 10] out)
<float[4, 3, 3, 3] w, float[4] b, float[1] two = {2.0}>
{
    [conv] conv = Conv (x, w, b)
    [relu] relu = Relu (conv)
    [swish] swish = HardSwish (conv)
    [zero] zero = Sub (relu, relu)
    [add] sum = Add (relu, swish)
    [transpose] moved = Transpose <perm = [0, 1, 3, 2]> (sum)
    [mul] out = Mul (moved, two)
}
"""


def text_model(text: str, **weights: npt.NDArray[Any]) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    names = {value.name for value in proto.graph.initializer}
    for name, values in weights.items():
        assert name not in names
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    del proto.graph.value_info[:]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture
def model() -> ir.Model:
    generator = np.random.default_rng(0)
    return text_model(
        MODEL,
        w=(generator.standard_normal((4, 3, 3, 3)) / 5).astype(np.float32),
        b=generator.standard_normal(4).astype(np.float32),
    )


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    x = np.random.default_rng(1).standard_normal((COUNT, 3, 12, 12)).astype(np.float32)
    x[COUNT - 1] *= 3  # the last sample has the largest values
    path = tmp_path / "samples.npz"
    np.savez(path, x=x, labels=np.zeros(COUNT))
    return path


def raw_values(model: ir.Model, tensors: list[str], samples: Path) -> dict[str, npt.NDArray[np.float32]]:
    proto = ir.to_proto(model)
    kept = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in tensors
        if name not in kept
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    with np.load(samples) as arrays:
        feed = {value.name: arrays[value.name] for value in session.get_inputs()}
    return dict(zip(tensors, session.run(tensors, feed), strict=True))


def assert_range(parameters: QuantizerParameters, values: npt.NDArray[Any], q: Quantizer) -> None:
    scale, zero_point = parameters_from_range(
        float(values.min()), float(values.max()), q.range, symmetric=q.symmetric
    )
    np.testing.assert_allclose(parameters.scale, scale, rtol=1e-5)
    assert abs(int(parameters.zero_point) - int(zero_point)) <= 1
    assert parameters.scale.dtype == np.float32
    assert parameters.zero_point.dtype == q.range.dtype
    assert isinstance(parameters.scale, np.ndarray)
    assert parameters.scale.shape == parameters.zero_point.shape == ()


class TestFromSamples:
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_minmax_is_that_of_the_raw_activations(
        self, model: ir.Model, samples: Path, bits: int, symmetric: bool
    ) -> None:
        tensors = ["relu", "swish", "sum", "out"]
        quantizers = [activation(name, bits=bits, symmetric=symmetric) for name in tensors]
        found = calibrate(model, plan(*quantizers), recipe(), samples)
        for name, values in raw_values(model, tensors, samples).items():
            assert_range(found[name], values, next(q for q in quantizers if q.name == name))
            assert found[name].initialized == "calibration:minmax"

    def test_a_graph_input_and_a_constant_are_observed(self, model: ir.Model, samples: Path) -> None:
        quantizers = activation("x"), activation("two")
        found = calibrate(model, plan(*quantizers), recipe(), samples)
        with np.load(samples) as arrays:
            assert_range(found["x"], arrays["x"], quantizers[0])
        assert_range(found["two"], np.array([2.0]), quantizers[1])

    def test_tensors_that_share_a_quantizer_have_a_joint_range(self, model: ir.Model, samples: Path) -> None:
        shared = activation("relu", "swish", "x")
        found = calibrate(model, plan(shared), recipe(), samples)
        values = raw_values(model, ["relu", "swish"], samples)
        with np.load(samples) as arrays:
            joint = np.concatenate([v.ravel() for v in (*values.values(), arrays["x"])])
        assert_range(found["relu"], joint, shared)

    def test_a_tensor_on_the_grid_of_another_is_not_counted_twice(
        self, model: ir.Model, samples: Path
    ) -> None:
        alone = calibrate(model, plan(activation("sum")), recipe("mse"), samples)
        moved = activation("sum", QuantizedTensor("moved", (), on_grid=True))
        assert calibrate(model, plan(moved), recipe("mse"), samples) == alone

    @pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
    def test_neither_batches_nor_passes_change_the_result(
        self, model: ir.Model, samples: Path, method: str
    ) -> None:
        quantizers = plan(*(activation(name) for name in ("x", "relu", "swish", "sum", "out")))
        whole = calibrate(model, quantizers, recipe(method), samples)
        for limit in (1, 5_000, 20_000):  # a pass for each tensor; several tensors; several samples
            parts = calibrate(model, quantizers, recipe(method), samples, memory_limit=limit)
            for name, parameters in whole.items():
                np.testing.assert_allclose(parts[name].scale, parameters.scale, rtol=1e-6)
                assert parts[name].zero_point == parameters.zero_point

    def test_the_same_inputs_give_the_same_bytes(self, model: ir.Model, samples: Path) -> None:
        quantizers = plan(activation("sum"), activation("swish"), weight("w", "conv", bits=4))
        first, second = (calibrate(model, quantizers, recipe("mse"), samples) for _ in range(2))
        for name in first:
            assert first[name].scale.tobytes() == second[name].scale.tobytes()

    def test_the_model_is_left_as_it_is(self, model: ir.Model, samples: Path) -> None:
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        calibrate(model, plan(activation("x"), activation("sum"), weight("w", "conv")), recipe(), samples)
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before

    @pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
    def test_a_tensor_of_zeros_is_said_to_be_uncalibrated(
        self, model: ir.Model, samples: Path, method: str
    ) -> None:
        found = calibrate(model, plan(activation("zero")), recipe(method), samples)["zero"]
        assert found.initialized == "uncalibrated:all_zero"
        np.testing.assert_allclose(found.scale, 2 / 255)

    def test_existing_quantizers_are_left_out(self, model: ir.Model, samples: Path) -> None:
        found = calibrate(
            model, plan(activation("relu"), activation("sum", existing=True)), recipe(), samples
        )
        assert set(found) == {"relu"}

    def test_existing_quantizers_of_the_model_take_part(self, model: ir.Model, samples: Path) -> None:
        relu = next(node for node in model.graph if node.name == "relu")
        scale, zero = (
            ir.Value(name=name, const_value=ir.tensor(values, name=name), type=ir.TensorType(dtype))
            for name, values, dtype in (
                ("s", np.array(1000.0, np.float32), ir.DataType.FLOAT),
                ("z", np.array(0, np.uint8), ir.DataType.UINT8),
            )
        )
        for value in (scale, zero):
            model.graph.register_initializer(value)
        node = fake_quantize.make(
            relu.outputs[0], scale, zero, IntegerRange(0, 15), axis=None, name="existing"
        )
        relu.outputs[0].replace_all_uses_with(node.outputs[0])
        node.replace_input_with(0, relu.outputs[0])
        model.graph.insert_after(relu, node)
        # All of relu is below half of a step of 1000: the sum is what swish alone is.
        found = calibrate(model, plan(activation("sum"), activation("swish")), recipe(), samples)
        assert found["sum"].scale == found["swish"].scale

    def test_a_fixed_batch_is_fed_whole(self, model: ir.Model, samples: Path) -> None:
        expected = calibrate(model, plan(activation("sum")), recipe(), samples)
        model.graph.inputs[0].shape = ir.Shape([4, 3, 12, 12])
        assert calibrate(model, plan(activation("sum")), recipe(), samples) == expected

    def test_opened_samples_are_taken_as_well_as_a_path(self, model: ir.Model, samples: Path) -> None:
        quantizers = plan(activation("sum"))
        opened = NpzSamples.open(samples, model.graph.inputs)
        assert calibrate(model, quantizers, recipe(), opened) == calibrate(
            model, quantizers, recipe(), samples
        )

    def test_progress_reaches_one_and_never_goes_back(self, model: ir.Model, samples: Path) -> None:
        reports: list[tuple[str, float]] = []
        quantizers = plan(activation("relu"), activation("sum"))
        calibrate(
            model, quantizers, recipe(), samples, progress=lambda *r: reports.append(r), memory_limit=2_000
        )
        fractions = [fraction for _, fraction in reports]
        assert {stage for stage, _ in reports} == {"calibrate"}
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
        assert len(fractions) > COUNT


class TestBiasRoom:
    def test_the_scale_of_a_tiny_channel_leaves_its_bias_room(self, samples: Path) -> None:
        w = np.ones((4, 3, 3, 3), np.float32)
        w[1], w[2] = 1e-9, 0
        b = np.array([1, 1e4, 1e9, 0], np.float32)
        model = text_model(MODEL, w=w, b=b)
        data = activation(QuantizedTensor("x", ("conv",)))
        found = calibrate(model, plan(data, weight("w", "conv")), recipe(), samples)
        product = found["x"].scale.astype(np.float64) * found["w"].scale
        assert (np.abs(b) / product <= LARGEST_BIAS * (1 + 1e-5)).all()
        np.testing.assert_allclose(found["w"].scale[[0, 3]], 1 / 127, rtol=1e-6)

    def test_one_scale_for_all_channels(self, samples: Path) -> None:
        model = text_model(
            MODEL, w=np.full((4, 3, 3, 3), 1e-9, np.float32), b=np.array([0, 1, 2, -9e5], np.float32)
        )
        data = activation(QuantizedTensor("x", ("conv",)))
        found = calibrate(model, plan(data, weight("w", "conv", axis=None)), recipe(), samples)
        np.testing.assert_allclose(found["w"].scale, 9e5 / (found["x"].scale * LARGEST_BIAS), rtol=1e-5)
        assert found["w"].scale.shape == ()


class TestFailures:
    def test_a_run_that_fails_names_the_node(self, tmp_path: Path) -> None:
        model = text_model(
            """<ir_version: 10, opset_import: ["" : 18]>
            net (float[N, K] x) => (float[N, 2] out) <float[3, 2] w>
            { [the_product] out = MatMul (x, w) }""",
            w=np.ones((3, 2), np.float32),
        )
        path = tmp_path / "samples.npz"
        np.savez(path, x=np.ones((2, 5), np.float32))
        with pytest.raises(QatError) as caught:
            calibrate(model, plan(activation("out")), recipe(), path)
        assert (caught.value.code, caught.value.node) == (ErrorCode.RUN_FAILED, "the_product")
        assert len(caught.value.message) < 600
        assert "onnxruntime_src" not in caught.value.message

    def test_a_model_that_onnxruntime_does_not_take(self, model: ir.Model, samples: Path) -> None:
        model.graph.node(4).op_type = "NoSuchOperator"
        with pytest.raises(QatError) as caught:
            calibrate(model, plan(activation("out")), recipe(), samples)
        assert caught.value.code == ErrorCode.RUN_FAILED

    @pytest.mark.parametrize("method", ["minmax", "mse"])
    def test_a_tensor_that_becomes_infinite_is_named(self, tmp_path: Path, method: str) -> None:
        model = text_model(
            """<ir_version: 10, opset_import: ["" : 18]>
            net (float[N, 2] x) => (float[N, 2] out) { [log] out = Log (x) }"""
        )
        path = tmp_path / "samples.npz"
        x = np.ones((40, 2), np.float32)
        x[30] = 0
        np.savez(path, x=x)
        with pytest.raises(QatError, match="'out'") as caught:
            calibrate(model, plan(activation("out")), recipe(method), path)
        assert caught.value.code == ErrorCode.RUN_FAILED
        assert "samples 16 to 31" in caught.value.message

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_weight_that_is_not_finite(self, samples: Path, bits: int) -> None:
        w = np.ones((4, 3, 3, 3), np.float32)
        w[3, 1] = np.nan
        model = text_model(MODEL, w=w, b=np.zeros(4, np.float32))
        with pytest.raises(QatError, match="'w'") as caught:
            calibrate(model, plan(weight("w", "conv", bits=bits)), recipe(), samples)
        assert caught.value.code == ErrorCode.MODEL_INVALID

    def test_samples_that_do_not_fit_the_model(self, model: ir.Model, tmp_path: Path) -> None:
        path = tmp_path / "samples.npz"
        np.savez(path, images=np.zeros((1, 3, 12, 12), np.float32))
        with pytest.raises(QatError) as caught:
            calibrate(model, plan(activation("out")), recipe(), path)
        assert (caught.value.code, caught.value.field) == (ErrorCode.DATA_INPUT_MISSING, "x")


def test_mnist_conv_on_digits(real_model: Callable[[str], Path], digits: Any, tmp_path: Path) -> None:
    """A real model and data: minmax is that of the raw activations, and mse does no worse on any tensor."""
    model = ir.load(real_model("mnist-conv"))
    RemoveInitializersFromInputsPass()(model)
    images = digits.test.images[:32]
    computed = [node.outputs[0] for node in model.graph if node.op_type in ("Conv", "Relu", "Add", "MatMul")]
    quantizers = [activation(value.name or "", bits=4) for value in computed]
    path = tmp_path / "digits.npz"
    np.savez(path, Input3=images)
    by_minmax, by_mse = (calibrate(model, plan(*quantizers), recipe(m), path) for m in ("minmax", "mse"))
    for quantizer in quantizers:
        values = _per_sample(model, quantizer.name, images)
        assert_range(by_minmax[quantizer.name], values, quantizer)
        errors = [_squared_error(values, p[quantizer.name], quantizer) for p in (by_mse, by_minmax)]
        assert errors[0] <= errors[1] * 1.001


def _squared_error(values: npt.NDArray[Any], parameters: QuantizerParameters, q: Quantizer) -> float:
    x, scale = values.astype(np.float64), parameters.scale.astype(np.float64)
    integers = quantize(x, scale, parameters.zero_point, q.range)
    return float(np.mean((dequantize(integers, scale, parameters.zero_point) - x) ** 2))


def _per_sample(model: ir.Model, name: str, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([name], {"Input3": image[None]})[0] for image in images])


_PEAK = """
import pathlib, sys
import onnx_ir as ir
from rewriter.calibration import calibrate
from rewriter.quantization import *
from rewriter.recipe import Recipe
model = ir.load(sys.argv[1])
quantizers = tuple(
    Quantizer(name, "activation", 8, IntegerRange(0, 255), False, None, (QuantizedTensor(name, ()),))
    for name in ("x", "conv", "relu", "swish", "sum", "out")
)
recipe = Recipe.parse({"calibration": {"method": sys.argv[3]}})
calibrate(model, Plan(quantizers, (), ()), recipe, pathlib.Path(sys.argv[2]), memory_limit=2**24)
# The peak of this program alone: ru_maxrss would include that of the process that started it.
status = pathlib.Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_memory_does_not_grow_with_the_number_of_samples(
    model: ir.Model, tmp_path: Path, method: str
) -> None:
    model.graph.inputs[0].shape = ir.Shape(["N", 3, "H", "W"])
    model.graph.outputs[0].shape = ir.Shape(["N", 4, "H2", "W2"])
    ir.save(model, tmp_path / "model.onnx")
    peaks = []
    for count in (64, 512):
        path = tmp_path / f"{count}.npz"
        np.savez_compressed(path, x=np.ones((count, 3, 96, 96), np.float32))
        arguments = [str(tmp_path / "model.onnx"), str(path), method]
        run = subprocess.run(
            [sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stdout) * 1024)
    # The activations of 448 more samples would be 330 MB, the samples themselves 50 MB.
    assert peaks[1] - peaks[0] < 20e6


@pytest.fixture(autouse=True)
def _no_temporary_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert not list(folder.iterdir())
