"""What finalize says of its result: kernels as onnxruntime chooses them, differences as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from rewriter.calibration.npz import NpzSamples
from rewriter.errors import ErrorCode, QatError
from rewriter.finalize.verification import compare, count_layer_kernels
from rewriter.inference import session_options


def write(folder: Path, name: str, body: str, output: str = "float[N, 3] y") -> Path:
    text = f'<ir_version: 8, opset_import: ["" : 18]>\ng (float[N, 4] x) => ({output}) {body}'
    onnx.save(onnx.parser.parse_model(text), folder / name)
    return folder / name


LINEAR = "<float[4, 3] w = {0,1,2,3,4,5,6,7,8,9,10,11}, float[3] b = {0,0,BIAS}> { y = Gemm(x, w, b) }"


def samples(folder: Path, model: Path, count: int = 70) -> NpzSamples:
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32))
    return NpzSamples.open(folder / "x.npz", ir.load(model).graph.inputs)


def test_a_float_layer_is_counted_as_one(tmp_path: Path) -> None:
    assert count_layer_kernels(write(tmp_path, "m.onnx", LINEAR.replace("BIAS", "1"))) == {"Gemm": 1}


def test_integer_layers_are_counted_in_the_graph_that_runs(tmp_path: Path) -> None:
    quantized = """<float s = {0.02}, uint8 z = {128}, float t = {0.1}, int8 zero = {0},
        int8[4, 3] w = {0,1,2,3,4,5,6,7,8,9,10,11}> {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, t, zero)
        h = MatMul(d, v)  p = QuantizeLinear(h, t, z)  y = DequantizeLinear(p, t, z)
    }"""
    assert count_layer_kernels(write(tmp_path, "m.onnx", quantized)) == {"QLinearMatMul": 1}


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model = write(tmp_path, "m.onnx", LINEAR.replace("BIAS", "1"))
    found = compare(model, model, samples(tmp_path, model), {})
    assert (found.output, found.samples, found.top1, found.largest_difference) == ("y", 70, 1.0, 0.0)
    assert found.largest_difference_in_steps == 0


def test_differences_are_measured_on_all_samples_in_steps_of_the_output(tmp_path: Path) -> None:
    reference = write(tmp_path, "a.onnx", LINEAR.replace("BIAS", "0"))
    other = write(tmp_path, "b.onnx", LINEAR.replace("BIAS", "2"))
    found = compare(reference, other, samples(tmp_path, reference), {"y": 0.5})
    x = np.load(tmp_path / "x.npz")["x"].astype(np.float64)
    expected = x @ np.arange(12).reshape(4, 3)
    same = expected.argmax(1) == (expected + np.array([0, 0, 2])).argmax(1)
    assert 0 < same.mean() < 1
    assert found.top1 == pytest.approx(same.mean())
    assert found.largest_difference == pytest.approx(2, rel=1e-5)
    assert found.largest_difference_in_steps == pytest.approx(4, rel=1e-5)
    unquantized = compare(reference, other, samples(tmp_path, reference), {})
    assert unquantized.step == pytest.approx(np.ptp(expected) / 255, rel=1e-5)


@pytest.mark.parametrize("largest", [127, 63])
def test_saturating_sums_are_noticed_where_the_cpu_has_them(tmp_path: Path, largest: int) -> None:
    """The reference is what the integers make in NumPy. With VNNI 127 does not saturate either."""
    weights = np.random.default_rng(0).integers(largest - 8, largest + 1, (64, 3))
    body = f"""<float s = {{1}}, uint8 z = {{0}}, float t = {{0.01}}, int8 zero = {{0}},
        int8[64, 3] w = {{{",".join(map(str, weights.ravel()))}}}> {{
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, t, zero)
        y = MatMul(d, v)
    }}"""
    text = f'<ir_version: 8, opset_import: ["" : 18]>\ng (float[N, 64] x) => (float[N, 3] y) {body}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    x = np.random.default_rng(1).integers(200, 256, (70, 64))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    opened = NpzSamples.open(tmp_path / "x.npz", ir.load(tmp_path / "m.onnx").graph.inputs)
    found = compare(tmp_path / "m.onnx", tmp_path / "m.onnx", opened, {})
    assert count_layer_kernels(tmp_path / "m.onnx") == {"MatMulIntegerToFloat": 1}
    by_default, safe = (
        onnxruntime.InferenceSession(tmp_path / "m.onnx", options).run(None, {"x": x.astype(np.float32)})[0]
        for options in (None, session_options(may_saturate=False))
    )
    exact = x @ weights * 0.01
    np.testing.assert_allclose(safe, exact, rtol=1e-5)
    assert found.saturates == (not np.allclose(by_default, exact, rtol=1e-5))
    assert found.top1 is not None
    assert found.top1_without_saturation is not None
    if largest == 63:
        assert not found.saturates
    assert (found.top1 < found.top1_without_saturation) == found.saturates


def test_an_output_without_classes_has_no_top1(tmp_path: Path) -> None:
    body = "<float[4] w = {1,2,3,4}> { y = MatMul(x, w) }"
    model = write(tmp_path, "m.onnx", body, "float[N] y")
    assert compare(model, model, samples(tmp_path, model), {}).top1 is None


def test_a_model_without_float_outputs_cannot_be_compared(tmp_path: Path) -> None:
    model = write(tmp_path, "m.onnx", "{ y = ArgMax<axis = 1, keepdims = 0>(x) }", "int64[N] y")
    with pytest.raises(QatError, match="no float32 output") as caught:
        compare(model, model, samples(tmp_path, model), {})
    assert caught.value.code == ErrorCode.RUN_FAILED
