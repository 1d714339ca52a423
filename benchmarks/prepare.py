"""Time and peak memory of `rewriter.prepare`, beside what else people do with the same file and samples.

python -m benchmarks.prepare [--repetitions N] [--json FILE] [MODEL ...]

Measured, each in a fresh process of its own, in turns:

* load_save: `onnx.load` and `onnx.save`, the least that any tool must do;
* quantize_static: `onnxruntime.quantization` with what these files need for it to work at all: initializers
  no longer graph inputs and opset 13 where the file is older, `quant_pre_process` without symbolic shape
  inference (it stops at ppocr2-cls), then `quantize_static` to per-channel int8 (QDQ, MinMax), one sample a
  call. It writes one int8 model;
* prepare: with the default recipe. It writes the QAT model, three training graphs and a checkpoint.

Seconds are those of the call alone, without Python's start and the imports. Peak memory is the process's
largest resident set, everything included; `imports` is how much of it was there before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from examples.models import model_path

_SEED: Final = 0
_TIMEOUT_SECONDS: Final = 600
_OLDEST_OPSET_WITH_PER_CHANNEL_QDQ: Final = 13
_OLDEST_IR_WITHOUT_INITIALIZER_INPUTS: Final = 4
_LONGEST_ERROR: Final = 160
_PACKAGES: Final = ("onnx", "onnx-ir", "onnxruntime-training-cpu", "onnxruntime-training", "numpy")

Samples = dict[str, NDArray[Any]]
Make = Callable[[np.random.Generator], Samples]


def _images(name: str, count: int, *shape: int) -> Make:
    return lambda random: {name: random.random((count, *shape), np.float32)}


def _sentences(count: int, length: int) -> Make:
    return lambda random: {
        "input_ids": random.integers(1000, 30000, (count, length)),
        "attention_mask": np.ones((count, length), np.int64),
    }


# Random samples of each model's own shape: what they are does not change the work.
SAMPLES: Final[Mapping[str, Make]] = {
    "ppocr2-cls": _images("x", 64, 3, 48, 192),
    "light-densenet121": _images("data_0", 16, 3, 224, 224),
    "minilm-l3": _sentences(64, 64),
}


@dataclass(frozen=True)
class Run:
    """One call in one process; `error` says why there are no numbers."""

    seconds: float = 0.0
    peak_bytes: int = 0
    imports_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """All runs of one operation on one model."""

    model: str
    operation: str
    runs: tuple[Run, ...]

    @property
    def error(self) -> str | None:
        return next((run.error for run in self.runs if run.error), None)

    def values(self, field: str) -> list[float]:
        return [getattr(run, field) for run in self.runs if run.error is None]

    def median(self, field: str) -> float | None:
        """Median over the runs; None if any of them failed."""
        return None if self.error else statistics.median(self.values(field))


# --- The operations; each runs in a child process and returns what is to be timed, its imports done. ---


def _load_save(model: Path, samples: Path, folder: Path) -> Callable[[], object]:
    import onnx

    return lambda: onnx.save(onnx.load(model), folder / "model.onnx")


def _quantize_static(model: Path, samples: Path, folder: Path) -> Callable[[], object]:
    import onnx
    import onnx.version_converter
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            with np.load(samples) as arrays:
                self._samples: Iterator[Samples] = iter(_one_by_one(dict(arrays)))

        def get_next(self) -> Samples | None:
            return next(self._samples, None)

    def call() -> None:
        source = model
        loaded = onnx.load(model)
        opset = next(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx"))
        if opset < _OLDEST_OPSET_WITH_PER_CHANNEL_QDQ:
            source = folder / "converted.onnx"
            initializers = {tensor.name for tensor in loaded.graph.initializer}
            inputs = [value for value in loaded.graph.input if value.name not in initializers]
            del loaded.graph.input[:]
            loaded.graph.input.extend(inputs)
            loaded.ir_version = max(loaded.ir_version, _OLDEST_IR_WITHOUT_INITIALIZER_INPUTS)
            loaded = onnx.version_converter.convert_version(loaded, _OLDEST_OPSET_WITH_PER_CHANNEL_QDQ)
            onnx.save(loaded, source)
        del loaded
        quant_pre_process(source, folder / "preprocessed.onnx", skip_symbolic_shape=True)
        quantize_static(
            folder / "preprocessed.onnx",
            folder / "int8.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )

    return call


def _prepare(model: Path, samples: Path, folder: Path) -> Callable[[], object]:
    from rewriter import prepare

    return lambda: prepare(model, folder / "bundle", calibration=samples)


OPERATIONS: Final[Mapping[str, Callable[[Path, Path, Path], Callable[[], object]]]] = {
    "load_save": _load_save,
    "quantize_static": _quantize_static,
    "prepare": _prepare,
}


def _one_by_one(arrays: Samples) -> list[Samples]:
    count = len(next(iter(arrays.values())))
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]


# --- Measuring. ---


def _peak_bytes() -> int:
    """Largest resident set of this process so far (unlike ru_maxrss, without the parent's before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _measure_here(operation: str, model: Path, samples: Path) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        call = OPERATIONS[operation](model, samples, Path(folder))
        imports_bytes = _peak_bytes()
        start = time.perf_counter()
        call()
        return Run(time.perf_counter() - start, _peak_bytes(), imports_bytes)


def _measure_in_child(operation: str, model: Path, samples: Path) -> Run:
    command = [sys.executable, "-m", "benchmarks.prepare", "--child", operation, str(model), str(samples)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS, cwd=_repository()
        )
    except subprocess.TimeoutExpired:
        return Run(error=f"no result after {_TIMEOUT_SECONDS} s")
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        reason = next(filter(str.strip, reversed(child.stderr.splitlines())), "no message")
        return Run(error=f"exit status {child.returncode}: {reason[:_LONGEST_ERROR]}")
    return Run(**json.loads(lines[-1]))


def _repository() -> Path:
    return Path(__file__).resolve().parents[1]


def measure(models: list[str], repetitions: int, folder: Path) -> list[Row]:
    """Run every operation on every model `repetitions` times, in turns, so that drift falls on all alike."""
    rows = []
    for name in models:
        samples = folder / f"{name}.npz"
        np.savez(samples, **SAMPLES[name](np.random.default_rng(_SEED)))  # type: ignore[arg-type]
        runs: dict[str, list[Run]] = {operation: [] for operation in OPERATIONS}
        for repetition in range(repetitions):
            for operation in OPERATIONS:
                print(f"{name}: {operation} {repetition + 1}/{repetitions}", file=sys.stderr)
                runs[operation].append(_measure_in_child(operation, model_path(name), samples))
        rows += [Row(name, operation, tuple(runs[operation])) for operation in OPERATIONS]
    return rows


# --- Reporting. ---


def report(rows: list[Row]) -> str:
    """The table; the ratio columns compare `prepare` with each operation on the same model."""
    prepare = {row.model: row for row in rows if row.operation == "prepare"}
    header = (
        "model",
        "operation",
        "seconds",
        "(min..max)",
        "peak MiB",
        "(min..max)",
        "imports",
        "prepare is",
    )
    lines = [header]
    for row in rows:
        if row.error:
            lines.append((row.model, row.operation, f"failed: {row.error}", "", "", "", "", ""))
            continue
        seconds, peak = row.values("seconds"), [value / 2**20 for value in row.values("peak_bytes")]
        imports = (row.median("imports_bytes") or 0) / 2**20
        lines.append(
            (
                row.model,
                row.operation,
                f"{statistics.median(seconds):.2f}",
                f"({min(seconds):.2f}..{max(seconds):.2f})",
                f"{statistics.median(peak):.0f}",
                f"({min(peak):.0f}..{max(peak):.0f})",
                f"{imports:.0f}",
                _ratios(prepare[row.model], row),
            )
        )
    complete = [line for line in lines if not line[2].startswith("failed")]
    widths = [max(len(line[column]) for line in complete) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _ratios(prepare: Row, other: Row) -> str:
    if prepare.error or other is prepare:
        return ""
    time_ratio = (prepare.median("seconds") or 0) / (other.median("seconds") or 1)
    memory_ratio = (prepare.median("peak_bytes") or 0) / (other.median("peak_bytes") or 1)
    return f"{time_ratio:.2f} x time, {memory_ratio:.2f} x memory"


def _environment() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:  # one of the two training packages
            continue
    return {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0)), "packages": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure prepare beside load+save and quantize_static.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(SAMPLES))
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every run, and the versions, to FILE"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        operation, model, samples = arguments.child
        print(json.dumps(asdict(_measure_here(operation, Path(model), Path(samples)))))
        return 0
    models = arguments.models or list(SAMPLES)
    if unknown := [name for name in models if name not in SAMPLES]:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(SAMPLES)}")
    if arguments.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(models, arguments.repetitions, Path(folder))
    print(report(rows))
    if arguments.json:
        document = {"environment": _environment(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any(row.error for row in rows if row.operation == "prepare") else 0


if __name__ == "__main__":
    raise SystemExit(main())
