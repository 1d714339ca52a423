"""Declared shapes that the operators do not compute are dropped; true ones stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import rewriter
from rewriter.declared_shapes import drop_false_shapes


def model(output: list[int | str], inner: list[int | str] | None = None) -> onnx.ModelProto:
    """x [N, 4] -> Gemm -> h [N, 8] -> Relu -> Gemm -> y [N, 3], with the shapes declared as given."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N, 4] x) => (float y) { [a] h = Gemm(x, v) [r] r = Relu(h) [b] y = Gemm(r, w) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("v", (4, 8)), ("w", (8, 3))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, output))
    if inner is not None:
        proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, inner))
    return proto


@pytest.mark.parametrize(
    ("output", "inner", "false"),
    [
        (["N", 4], None, "y"),
        (["N", 3, 1], None, "y"),
        (["N", 3], ["N", 7], "h"),
        (["N", 3], [7, 2, 8], "h"),
    ],
)
def test_a_false_shape_is_ignored(
    tmp_path: Path, output: list[int | str], inner: list[int | str] | None, false: str
) -> None:
    onnx.save(model(output, inner), tmp_path / "float.onnx")
    manifest = rewriter.prepare(tmp_path / "float.onnx", tmp_path / "bundle")
    assert any(f"shape for {false!r}" in warning for warning in manifest.warnings)
    x, labels = np.ones((4, 4), np.float32), np.array([0, 1, 2, 0])
    np.savez(tmp_path / "train.npz", x=x, labels=labels)
    assert rewriter.finetune(tmp_path / "bundle", tmp_path / "train.npz").steps == 1
    onnx.checker.check_model(onnx.load(tmp_path / "bundle" / "qat_model.onnx"), full_check=True)


@pytest.mark.parametrize(
    ("output", "inner"), [(["N", 3], ["N", 8]), (["batch", "classes"], [-1, 8]), ([5, 3], None)]
)
def test_a_shape_that_can_be_true_stays(output: list[int | str], inner: list[int | str] | None) -> None:
    proto = model(output, inner)
    before = proto.SerializeToString()
    assert drop_false_shapes(proto) is None
    assert proto.SerializeToString() == before


def test_a_model_that_onnxruntime_refuses_makes_no_bundle(tmp_path: Path) -> None:
    proto = model(["N", 3])
    proto.graph.node[1].CopyFrom(helper.make_node("Flatten", ["h"], ["r"], name="bad", axis=9))
    onnx.save(proto, tmp_path / "float.onnx")
    with pytest.raises(rewriter.QatError) as caught:
        rewriter.prepare(tmp_path / "float.onnx", tmp_path / "bundle")
    assert (caught.value.code.value, caught.value.node) == ("run_failed", "bad")
    assert not (tmp_path / "bundle").exists()
