"""Every setting of the recipe, from the float file to the int8 model: it trains, and what is deployed is what
was trained, to the bit (graph optimizations off)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import rewriter
from rewriter import Recipe, inference
from rewriter.training.runtime import open_session
from tests.rewriter.training.test_training_batch_norm import IMAGE, separable_net

BITS = (2, 3, 4, 5, 6, 7, 8)
SAMPLES = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and samples.npz to calibrate and compare on."""
    folder = tmp_path_factory.mktemp("model")
    onnx.save(ir.to_proto(separable_net().model()), folder / "model.onnx")
    samples = np.random.default_rng(0).standard_normal((SAMPLES, *IMAGE)).astype(np.float32)
    np.savez(folder / "samples.npz", x=samples)
    return folder


def train_and_finalize(files: Path, folder: Path, recipe: Recipe, steps: int = 4) -> np.ndarray:
    """Train a little; require that the int8 model gives what the trained eval model gives, and return it."""
    rewriter.prepare(
        files / "model.onnx", folder / "bundle", recipe=recipe, calibration=files / "samples.npz"
    )
    session = open_session(folder / "bundle")
    session.optimizer.set_learning_rate(1e-2)
    random = np.random.default_rng(1)
    losses = []
    for _ in range(steps):
        session.module.train()
        x = random.standard_normal((8, *IMAGE)).astype(np.float32)
        losses.append(float(session.module(x, random.integers(0, 4, 8))))
        session.optimizer.step()
        session.module.lazy_reset_grad()
    assert np.isfinite(losses).all()
    session.save(folder / "bundle" / "trained_checkpoint")
    with np.load(files / "samples.npz") as arrays:
        x = arrays["x"]
    session.module.eval()
    _, expected = session.module(x, np.zeros(SAMPLES, np.int64))
    report = rewriter.finalize(folder / "bundle", folder / "int8.onnx", verify=files / "samples.npz")
    assert report.agreement is not None
    assert report.agreement.largest_difference == 0
    exact = inference.open_session(folder / "int8.onnx", inference.session_options(optimize=False))
    (found,) = inference.run(exact, ["y"], {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize(
    ("bits", "ranges", "per_channel"),
    [
        (bits, ranges, per_channel)
        for index, (bits, ranges, per_channel) in enumerate(
            itertools.product(BITS, ("learned", "moving_average", "fixed"), (True, False))
        )
        if index % 2 == 0 or bits in (2, 4, 8)
    ],
)
def test_bits_ranges_and_granularity(
    files: Path, tmp_path: Path, bits: int, ranges: str, per_channel: bool
) -> None:
    recipe = Recipe(weight_bits=bits, activation_bits=bits, ranges=ranges, per_channel=per_channel)  # type: ignore[arg-type]
    train_and_finalize(files, tmp_path, recipe)


def test_a_model_that_is_finalized_before_its_delay_is_over_says_so(files: Path, tmp_path: Path) -> None:
    recipe = Recipe(quant_delay=100, overrides=(rewriter.Override(match="c1", quant_delay=0),))
    rewriter.prepare(files / "model.onnx", tmp_path / "bundle", recipe=recipe)
    report = rewriter.finalize(tmp_path / "bundle", tmp_path / "int8.onnx")
    (warning,) = report.warnings
    assert warning.startswith("after 0 steps 10 of 13 quantizers still wait for their quant_delay")


@pytest.mark.parametrize(
    "settings",
    [
        {"symmetric": True},
        {"symmetric": True, "ranges": "moving_average", "weight_bits": 4},
        {"activation_bits": 16},
        {"activation_bits": 12, "symmetric": True, "weight_bits": 3},
        {"activation_bits": 10, "ranges": "moving_average"},
        {"quant_delay": 2, "freeze_bn_delay": 3},
        {"freeze_bn_delay": 0},
        {"fold_statistics": "float_layer"},
        {"batch_norm": "keep"},
        {"batch_norm": "fold_inference"},
        {"target": "tf_contrib"},
        {"target": "tf_contrib", "ranges": "moving_average", "per_channel": False},
        {"target": "tf_contrib", "ranges": "moving_average", "symmetric": True, "weight_bits": 4},
        {"optimizer": "sgd", "step_counter": "optimizer_steps"},
        {
            "overrides": (
                {"match": "c2", "weight_bits": 2, "ranges": "fixed"},
                {"match": "Gemm", "quantize": False},
            )
        },
        {"overrides": ({"match": "c4", "activation_bits": 16}, {"match": "c1", "ranges": "moving_average"})},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items() if k != "overrides") or "overrides",
)
def test_settings(files: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    train_and_finalize(files, tmp_path, Recipe.parse(settings))
