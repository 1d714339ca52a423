"""finalize as a whole: its files, its report. (Real models: test_real_models.py.)"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import rewriter
from rewriter import load as load_module
from rewriter.errors import ErrorCode, QatError
from tests.rewriter.training import nets


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    ir.save(nets.mlp(), tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", x=nets.batch(16)[0])
    rewriter.prepare(tmp_path / "model.onnx", tmp_path / "bundle", calibration=tmp_path / "samples.npz")
    return tmp_path / "bundle"


def run(model: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    result: np.ndarray = onnxruntime.InferenceSession(model, options).run(None, {"x": nets.batch(16)[0]})[0]
    return result


def test_the_report_describes_the_one_file(bundle: Path, tmp_path: Path) -> None:
    report = rewriter.finalize(bundle, tmp_path / "out" / "int8.onnx")
    content = (tmp_path / "out" / "int8.onnx").read_bytes()
    (file,) = report.files
    assert (file.name, file.bytes) == ("int8.onnx", len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert report.integer_weights == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["int8.onnx"]


def test_weights_too_large_for_a_file_lie_in_another_of_a_lasting_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewriter.finalize(bundle, tmp_path / "one.onnx")
    monkeypatch.setattr(load_module, "EXTERNAL_DATA_THRESHOLD", 0)
    target = tmp_path / "out" / "two.onnx"
    report = rewriter.finalize(bundle, target, verify=tmp_path / "samples.npz")
    assert [file.name for file in report.files] == ["two.onnx", "two.onnx.data"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["two.onnx", "two.onnx.data"]
    for file in report.files:
        assert file.sha256 == hashlib.sha256((target.parent / file.name).read_bytes()).hexdigest()
    assert f"{sum(file.bytes for file in report.files)} bytes" in report.summary()
    tensors = onnx.load(target, load_external_data=False).graph.initializer
    locations = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    assert locations <= {"two.onnx.data"}
    np.testing.assert_array_equal(run(target), run(tmp_path / "one.onnx"))


@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize("classes", [True, False])
def test_a_cpu_on_which_sums_saturate_is_warned_of(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: bool, saturates: bool
) -> None:
    def compared(*_: object) -> rewriter.Agreement:
        top1, better = (0.9165, 1.0) if classes else (None, None)
        return rewriter.Agreement(
            output="y",
            samples=16,
            top1=top1,
            top1_without_saturation=better,
            saturates=saturates,
            largest_difference=0,
            step=1,
        )

    module = importlib.import_module("rewriter.finalize")  # the function has its name
    monkeypatch.setattr(module, "compare", compared)
    report = rewriter.finalize(bundle, tmp_path / "int8.onnx", verify=tmp_path / "samples.npz")
    if not saturates:
        assert report.warnings == ()
        return
    (warning,) = report.warnings
    assert "config entry session.x64quantprecision = 1, or prepare the model with weight_bits 7" in warning
    assert ("same top-1 on 91.65% without the entry, 100.00% with it" in warning) == classes


def test_a_failure_leaves_the_former_result_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "int8.onnx").write_text("former")
    np.savez(tmp_path / "bad.npz", x=np.full((4, nets.FEATURES), np.nan, np.float32))
    with pytest.raises(QatError) as caught:
        rewriter.finalize(bundle, tmp_path / "out" / "int8.onnx", verify=tmp_path / "bad.npz")
    assert caught.value.code == ErrorCode.DATA_NOT_FINITE
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["former"]


def test_a_relative_output_without_a_folder(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rewriter.finalize(bundle, Path("int8.onnx")).files[0].name == "int8.onnx"
    assert (tmp_path / "int8.onnx").is_file()
