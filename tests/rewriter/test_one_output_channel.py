"""Layers with one output channel (a binary classifier, a mask) go all the way to integer kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter import Recipe, finalize, prepare
from tests.rewriter.graphs import graph

# A graph, and the kernel that runs its layer in integers.
MODELS = {
    "classifier": ("g (float[N,6] x) => (y) <float[6,1] w, float[1] b> { y = Gemm(x, w, b) }", "QGemm"),
    "scalar_bias": ("g (float[N,6] x) => (y) <float[6,1] w, float b> { y = Gemm(x, w, b) }", "QGemm"),
    "row_bias": ("g (float[N,6] x) => (y) <float[6,1] w, float[1,1] b> { y = Gemm(x, w, b) }", "QGemm"),
    "factors": (
        "g (float[N,6] x) => (y) <float[6,1] w, float[1] b> { y = Gemm<alpha=0.5, beta=3.0>(x, w, b) }",
        "QGemm",
    ),
    "mask": (
        "g (float[N,3,8,8] x) => (y) <float[1,3,3,3] w, float[1] b> { y = Conv(x, w, b) }",
        "QLinearConv",
    ),
    "depthwise": (
        "g (float[N,1,8,8] x) => (y) <float[1,1,3,3] w, float[1] b> { y = Conv(x, w, b) }",
        "QLinearConv",
    ),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_prepared_and_finalized(name: str, per_channel: bool, tmp_path: Path) -> None:
    text, kernel = MODELS[name]
    model = graph(text)
    ir.save(model, tmp_path / "float.onnx")
    (x,) = model.graph.inputs
    rng = np.random.default_rng(0)
    shape = [16, *(size for size in x.shape if isinstance(size, int))]
    np.savez(tmp_path / "x.npz", x=rng.standard_normal(shape).astype(np.float32))
    recipe = Recipe(loss="mse", per_channel=per_channel)
    prepare(tmp_path / "float.onnx", tmp_path / "bundle", recipe=recipe, calibration=tmp_path / "x.npz")
    report = finalize(tmp_path / "bundle", tmp_path / "int8.onnx", verify=tmp_path / "x.npz")
    assert report.layer_kernels == {kernel: 1}
    assert report.agreement is not None
    assert report.agreement.largest_difference_in_steps < 1e-3
    written = onnx.load(tmp_path / "int8.onnx").graph
    types = {one.name: (one.data_type, list(one.dims)) for one in written.initializer}
    assert types["b_int32"] == (onnx.TensorProto.INT32, [1])
    assert types["w_quantized"][0] == onnx.TensorProto.INT8
