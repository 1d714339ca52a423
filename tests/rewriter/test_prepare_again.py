"""A QAT model that we wrote is prepared again: it keeps its quantizers, and gets no others."""

from __future__ import annotations

from pathlib import Path

import pytest

import rewriter
from rewriter.load import save
from rewriter.manifest import Manifest, QuantizerEntry
from tests.rewriter.graphs import graph

MODEL = (
    "g (float[N,3,8,8] x) => (float[N,5] y) <float[6,3,3,3] w, float[6] b, float[6,1,3,3] d, float[6] db, "
    "float[6,4,2,2] t, float[4] tb, float[4,7] m, float[7,5] f, float[5] fb> { "
    "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) e = Conv<group=6>(r, d, db) u = ConvTranspose(e, t, tb) "
    "p = GlobalAveragePool(u) h = Flatten(p) n = MatMul(h, m) k = Relu(n) y = Gemm(k, f, fb) }"
)


def facts(quantizer: QuantizerEntry) -> tuple[object, ...]:
    return (
        quantizer.kind, quantizer.tensor, quantizer.bits, quantizer.qmin, quantizer.qmax, quantizer.dtype,
        quantizer.axis, quantizer.initial_scale, quantizer.initial_zero_point,
        frozenset(quantizer.nodes),
    )  # fmt: skip


def quantizers(manifest: Manifest) -> dict[str, tuple[object, ...]]:
    return {quantizer.name: facts(quantizer) for quantizer in manifest.quantizers}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizers_stay_what_they_are(bits: int, per_channel: bool, tmp_path: Path) -> None:
    recipe = rewriter.Recipe(weight_bits=bits, activation_bits=bits, per_channel=per_channel)
    save(graph(MODEL), tmp_path / "model.onnx")
    first = rewriter.prepare(tmp_path / "model.onnx", tmp_path / "first", recipe=recipe)
    again = rewriter.prepare(tmp_path / "first" / "qat_model.onnx", tmp_path / "again", recipe=recipe)
    assert quantizers(again) == quantizers(first)
    assert {quantizer.bits for quantizer in again.quantizers} == {bits}
    assert all(quantizer.existing for quantizer in again.quantizers)
    assert set(again.training.trainable) == set(first.training.trainable)
    assert {"w", "d", "t", "m", "f", "b", "db", "tb", "fb"} <= set(again.training.trainable)
