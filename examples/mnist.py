"""The whole path on a real model and real data: mnist-conv and 5000 digits, at W8A8 and at W4A4, on the CPU.

python -m examples.mnist [DIR]    (default: build/mnist; bundles and int8 models stay there)

Prints top-1 on the 1000 test digits of the float model, of the int8 model before and after training, of the
fake-quantized model after training, and on how many digits these last two give the same answer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import rewriter
from examples.digits import INPUT_NAME, Digits, Samples, write_digits
from examples.models import model_path
from examples.package_files import FetchError

BITS: Final = (8, 4)
EPOCHS: Final = 5
BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 1e-3

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """Top-1 on the test digits and agreement of the trained models, all in percent."""

    bits: int
    float_top1: float
    int8_before_training: float
    fake_quantized: float
    int8: float
    agreement: float


def run(folder: Path, bits: int) -> Result:
    """Prepare, fine-tune and finalize mnist-conv with `bits` for weights and activations, in `folder`."""
    digits = write_digits(folder)
    bundle, untrained, trained = (
        folder / name
        for name in (f"w{bits}a{bits}", f"w{bits}a{bits}.untrained.onnx", f"w{bits}a{bits}.onnx")
    )
    recipe = rewriter.Recipe(weight_bits=bits, activation_bits=bits)
    rewriter.prepare(
        model_path("mnist-conv"),
        bundle,
        recipe=recipe,
        calibration=folder / "calibration.npz",
        replace=True,
    )
    rewriter.finalize(bundle, untrained)
    training = rewriter.finetune(
        bundle,
        folder / "train.npz",
        evaluation=folder / "test.npz",
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
    )
    rewriter.finalize(bundle, trained, verify=folder / "test.npz")
    fake_quantized = evaluate_bundle(bundle, training.checkpoint, digits.test)
    int8 = evaluate(trained, digits.test.images)
    return Result(
        bits=bits,
        float_top1=_top1(evaluate(model_path("mnist-conv"), digits.test.images), digits),
        int8_before_training=_top1(evaluate(untrained, digits.test.images), digits),
        fake_quantized=_top1(fake_quantized, digits),
        int8=_top1(int8, digits),
        agreement=100 * float(np.mean(fake_quantized == int8)),
    )


def evaluate(model: Path, images: NDArray[np.float32]) -> Classes:
    """The digit that a model gives for each image, in plain onnxruntime."""
    options = onnxruntime.SessionOptions()
    # Without this, sums of 8-bit products saturate on x86 CPUs without VNNI; on others it changes nothing.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # The float model has a batch of exactly one.
    logits = [session.run(None, {INPUT_NAME: images[i : i + 1]})[0] for i in range(len(images))]
    return _classes(np.concatenate(logits))


def evaluate_bundle(bundle: Path, checkpoint: Path, samples: Samples) -> Classes:
    """The digit that a trained bundle gives for each image, in stock onnxruntime-training alone."""
    api = rewriter.training_api()
    state = api.CheckpointState.load_checkpoint(checkpoint)
    module = api.Module(bundle / "training_model.onnx", state, bundle / "eval_model.onnx", device="cpu")
    module.eval()
    _loss, logits = module(samples.images, samples.labels)
    return _classes(logits)


def _classes(logits: NDArray[Any]) -> Classes:
    classes: Classes = logits.argmax(axis=1)
    return classes


def _top1(classes: Classes, digits: Digits) -> float:
    return 100 * float(np.mean(classes == digits.test.labels))


def report(results: list[Result]) -> str:
    header = "          float   int8, untrained   fake-quantized   int8   same answer"
    lines = [
        f"W{r.bits}A{r.bits}   {r.float_top1:8.2f}{r.int8_before_training:18.2f}{r.fake_quantized:17.2f}"
        f"{r.int8:7.2f}{r.agreement:14.2f}"
        for r in results
    ]
    return "\n".join(["top-1 on 1000 test digits, percent", header, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantization-aware training of mnist-conv on the CPU.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/mnist"), metavar="DIR")
    folder = parser.parse_args().folder
    try:
        results = []
        for bits in BITS:
            print(f"W{bits}A{bits}: prepare, fine-tune, finalize", file=sys.stderr)
            results.append(run(folder, bits))
    except (rewriter.QatError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
