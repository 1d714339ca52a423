"""Accuracy of quantized models on Fashion-MNIST: float, after training, and by quantization-aware training.

python -m benchmarks.fashion_mnist [--torch-python PATH] [--seeds N] [--short] [--json FILE]
python -m benchmarks.fashion_mnist --parameterizations [--seeds N]    (`benchmarks.fashion_parameterizations`)

Every row starts from the same float model of its seed, which our own path trains from scratch.

* Network: the residual network of `benchmarks.resnet` with 135 thousand weights, see `FULL`; data:
  `examples.fashion_mnist`, pixels in 0..1, one of two images mirrored at random while training, the same ones
  for every row of a seed. Of the 60000 training images the first 50000 are used, so that three seeds take
  less than an hour on two CPUs.
* Every training: AdamW without weight decay, a learning rate that falls to 0 along a half cosine, batches of
  128 in an order drawn from the seed; 5 epochs in float from scratch, then 3 for every other row.
* float: batch norm with batch statistics; exported with its running statistics, training_mode 0. `float,
  trained as long` goes on with the schedule of the quantized models.
* quantize_static: onnxruntime's, MinMax, per-channel int8 weights; it offers no fewer bits for a convolution.
* fixed ranges, not trained: our calibration alone (mse), `prepare` and `finalize`.
* QAT: `prepare` with the recipe's ranges "moving_average" or "learned" and batch_norm "fold_training", then
  training with stock onnxruntime-training, then `finalize`. Batch norms freeze for the last steps
  (`frozen_share`).
* PyTorch QAT (with --torch-python): see `benchmarks.fashion_torch`. Quantizers, their calibrated start,
  schedule and batches are those of "QAT, learned ranges".
* Bits: of the weights and the inputs of all convolutions. The first and the last layer have 8 for their
  weight and their input (`FIRST_AND_LAST`), and with the first one's input its result, which the recipe
  cannot tell apart; so have results that only an addition reads, which PyTorch models often leave in float.

Accuracy is top-1 on the test images of the file that `finalize` wrote, in plain onnxruntime with its default
optimizations; of the PyTorch rows that of the fake-quantized network in PyTorch. No model is chosen by it.

Models are trained side by side, one thread each, as many as there are CPUs (--jobs). CPU s: of the steps of
one model, mean; that is what they take on a CPU of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks import fashion_parameterizations
from benchmarks.fashion_table import aligned
from benchmarks.fashion_variants import (
    FLOAT,
    LEARNED,
    METHODS,
    MORE_FLOAT,
    MOVING_AVERAGE,
    ON_REQUEST,
    ONE_MODEL,
    PER_BITS,
    STATIC,
    TORCH,
    Outcome,
    Run,
    Settings,
    make,
)
from examples.fashion_mnist import load_fashion_mnist
from examples.package_files import FetchError

BITS: Final = (8, 4, 3, 2)
FULL: Final = Settings(
    widths=(16, 32, 96),
    blocks=1,
    stem_stride=2,
    train_samples=50000,
    test_samples=10000,
    batch_size=128,
    float_epochs=5,
    qat_epochs=3,
    float_rate=3e-3,
    qat_rate=5e-3,
    frozen_share=0.25,
)
SHORT: Final = Settings(
    widths=(8, 16, 32),
    blocks=1,
    stem_stride=2,
    train_samples=12800,
    test_samples=2000,
    batch_size=64,
    float_epochs=2,
    qat_epochs=1,
    float_rate=3e-3,
    qat_rate=5e-3,
    frozen_share=0.25,
)
SHORT_BITS: Final = (8, 2)
_PACKAGES: Final = ("onnx-qat", "onnx", "onnxruntime-training-cpu", "onnxruntime-training", "numpy")


# --- Making the models. ---


def measure(
    settings: Settings,
    seeds: int,
    bits: Sequence[int],
    methods: Sequence[str],
    jobs: int,
    torch_python: str | None,
    folder: Path,
) -> list[Outcome]:
    """Make every model of every seed, `jobs` at a time."""
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # onnxruntime's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context) as pool:
        pending: set[Future[Outcome]] = set()
        for seed in range(seeds):
            run = Run(settings, seed, folder / f"seed{seed}", torch_python=torch_python)
            pending.add(pool.submit(make, FLOAT, run))
        total = seeds * (1 + len(list(_others(methods, bits))))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                outcome = future.result()
                outcomes.append(outcome)
                progress = f"{len(outcomes)}/{total}, {time.perf_counter() - start:.0f} s"
                print(f"[{progress}] {_describe(outcome)}", file=sys.stderr, flush=True)
                if outcome.method == FLOAT and outcome.error is None:
                    for method, width in _others(methods, bits):
                        run = Run(settings, outcome.seed, folder / f"seed{outcome.seed}", width, torch_python)
                        pending.add(pool.submit(make, method, run))
    return outcomes


def _others(methods: Sequence[str], bits: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    """What is made from a float model, the longest trainings first."""
    for method in reversed(METHODS):
        if method not in methods or method == FLOAT:
            continue
        for width in (None,) if method in ONE_MODEL else bits:
            if method != STATIC or width == 8:
                yield method, width


def _describe(outcome: Outcome) -> str:
    name = outcome.method if outcome.bits is None else f"{outcome.method}, {_column(outcome.bits)}"
    result = f"{outcome.top1:.2f} %" if outcome.error is None else f"failed: {outcome.error}"
    return f"seed {outcome.seed}, {name}: {result} ({outcome.seconds:.0f} CPU s of training)"


# --- Reporting. ---


def report(outcomes: Sequence[Outcome], bits: Sequence[int]) -> str:
    """The table, the differences to float seed by seed, and what is expected of them."""
    present = [method for method in METHODS if any(o.method == method for o in outcomes)]
    header = ("top-1, percent", *(_column(width) for width in bits), "CPU s")
    lines = [header]
    for method in present:
        columns: tuple[int | None, ...] = (None,) if method in ONE_MODEL else tuple(bits)
        cells = [_cell(outcomes, method, width) for width in columns]
        cells += [""] * (len(bits) - len(cells))
        lines.append((method, *cells, _seconds(outcomes, method)))
    seeds = len({o.seed for o in outcomes})
    text = [f"mean of {seeds} seeds (lowest..highest)", *aligned(lines), ""]
    text += aligned(_differences(outcomes, bits))
    expectations = list(expected(outcomes))
    if expectations:
        text += ["", *aligned([("expected", "is", "allowed", ""), *expectations])]
    return "\n".join(text)


def values(outcomes: Sequence[Outcome], method: str, bits: int | None) -> dict[int, float]:
    """Top-1 by seed."""
    return {o.seed: o.top1 for o in outcomes if (o.method, o.bits) == (method, bits) and o.error is None}


def _cell(outcomes: Sequence[Outcome], method: str, bits: int | None) -> str:
    if method == STATIC and bits != 8:
        return "not offered"
    found = list(values(outcomes, method, bits).values())
    if not found:
        return "failed"
    return f"{statistics.mean(found):.2f} ({min(found):.2f}..{max(found):.2f})"


def _seconds(outcomes: Sequence[Outcome], method: str) -> str:
    found = [o.seconds for o in outcomes if o.method == method and o.error is None]
    return f"{statistics.mean(found):.0f}" if found and any(found) else ""


def _differences(outcomes: Sequence[Outcome], bits: Sequence[int]) -> list[tuple[str, ...]]:
    """To the float model of the same seed: mean (lowest..highest)."""
    lines = [("points above float", *(_column(width) for width in bits))]
    for method in (MORE_FLOAT, *PER_BITS):
        columns: tuple[int | None, ...] = (None,) if method in ONE_MODEL else tuple(bits)
        cells = []
        for width in columns:
            found = differences(outcomes, (method, width), (FLOAT, None))
            cells.append(_signed(found) if found else "")
        if any(cells):
            lines.append((method, *cells, *[""] * (len(bits) - len(cells))))
    return lines


def differences(
    outcomes: Sequence[Outcome], one: tuple[str, int | None], other: tuple[str, int | None]
) -> list[float]:
    """Top-1 of one model minus that of another, for the seeds that have both."""
    ours, theirs = values(outcomes, *one), values(outcomes, *other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _signed(found: Sequence[float]) -> str:
    return f"{statistics.mean(found):+.2f} ({min(found):+.2f}..{max(found):+.2f})"


ALLOWED_LOSS: Final = {8: 0.0, 4: 0.0, 3: 0.3, 2: 1.5}  # points below float, learned ranges


def expected(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str, str, str]]:
    """What is claimed of learned ranges: mean difference, the least it may be, and whether it is that."""
    for bits, loss in ALLOWED_LOSS.items():
        claims: list[tuple[str, tuple[str, int | None], float]] = []
        claims.append((f"{_column(bits)} learned - float", (FLOAT, None), 0 - loss))
        torch = list(values(outcomes, TORCH, bits).values())
        if torch:
            learned = list(values(outcomes, LEARNED, bits).values()) or torch
            spread = max(max(torch) - min(torch), max(learned) - min(learned))
            claims.append((f"{_column(bits)} learned - PyTorch", (TORCH, bits), 0 - spread))
        if bits <= 4:
            claims.append((f"{_column(bits)} learned - moving averages", (MOVING_AVERAGE, bits), 0.0))
        for name, other, least in claims:
            found = differences(outcomes, (LEARNED, bits), other)
            if found:
                mean = statistics.mean(found)
                verdict = "yes" if round(mean, 2) >= round(least, 2) else "NO"
                yield name, f"{mean:+.2f}", f">= {least:+.2f}", verdict


def _column(bits: int) -> str:
    return f"W{bits}A{bits}"


def _environment() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # one of the two training packages
            continue
    return {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0)), "packages": versions}


def _write(path: Path | None, settings: Settings, **content: Any) -> None:
    if path is not None:
        document = {"environment": _environment(), "settings": asdict(settings), **content}
        path.write_text(json.dumps(document) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy of quantized models on Fashion-MNIST.")
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 3, with --short 1")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, help="default: all, with --short 8 2")
    parser.add_argument("--short", action="store_true", help="a smaller network and fewer images: a minute")
    parser.add_argument(
        "--parameterizations", action="store_true", help="instead: what else a trained scale could be"
    )
    parser.add_argument("--method", action="append", choices=list(METHODS), help=f"only these and {FLOAT!r}")
    parser.add_argument(
        "--torch-python", metavar="PATH", help="Python interpreter that has torch; without it no torch rows"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep models and bundles in this new folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    arguments = parser.parse_args()
    settings = SHORT if arguments.short else FULL
    seeds = arguments.seeds or (1 if arguments.short else 3)
    bits = tuple(arguments.bits or (SHORT_BITS if arguments.short else BITS))
    methods = [
        method
        for method in METHODS
        if (method != TORCH or arguments.torch_python)
        and (method in arguments.method or method == FLOAT if arguments.method else method not in ON_REQUEST)
    ]
    if seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if arguments.keep and arguments.keep.exists():
        parser.error(f"{arguments.keep} exists")
    try:
        load_fashion_mnist()
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        if arguments.parameterizations:
            trials = fashion_parameterizations.measure(SHORT, arguments.seeds or 1, arguments.jobs, folder)
            print(fashion_parameterizations.report(trials))
            _write(arguments.json, SHORT, results=[asdict(trial) for trial in trials])
            return 0
        outcomes = measure(settings, seeds, bits, methods, arguments.jobs, arguments.torch_python, folder)
    print(report(outcomes, bits))
    print(f"\n{time.perf_counter() - start:.0f} s in all, {arguments.jobs} models at a time")
    _write(arguments.json, settings, outcomes=[asdict(outcome) for outcome in outcomes])
    return 1 if any(outcome.error for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
