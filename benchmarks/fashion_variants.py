"""The models that `benchmarks.fashion_mnist` compares: how each is made and evaluated.

One function a row: it takes a `Run` and returns an `Outcome`. What `float_model` writes, all others start
from.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

import rewriter
from benchmarks.fashion_schedule import Schedule
from benchmarks.fashion_torch_program import write_qat_program
from benchmarks.fashion_training import Training, evaluate, export_float, train
from benchmarks.resnet import resnet
from examples.fashion_mnist import CALIBRATION_SAMPLES, INPUT_NAME, Samples, load_fashion_mnist
from rewriter import Override, Recipe
from rewriter.bundle import TRAINED_CHECKPOINT
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.load import load
from rewriter.normalize import normalize
from rewriter.recipe import FoldStatistics, RangeSource
from rewriter.training.artifacts import write_training_artifacts

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_LONGEST_ERROR: Final = 160

# The first and the last layer: the weights, what they read, and what the first one makes.
FIRST_AND_LAST: Final = (
    Override(match="stem.conv", weight_bits=8, activation_bits=8),
    Override(match="pooled", activation_bits=8),
    Override(match="scores", weight_bits=8, activation_bits=8),
)


@dataclass(frozen=True)
class Settings:
    """Network, data and schedule, the same for every model of a table.

    Attributes:
        train_samples, test_samples: the first that many images of either file.
        float_rate, qat_rate: learning rates of the first step, AdamW.
        frozen_share: of the QAT steps, the last ones, in which batch norms use their running statistics.
    """

    widths: tuple[int, ...]
    blocks: int
    stem_stride: int
    train_samples: int
    test_samples: int
    batch_size: int
    float_epochs: int
    qat_epochs: int
    float_rate: float
    qat_rate: float
    frozen_share: float

    def float_schedule(self, seed: int) -> Schedule:
        return Schedule(self.train_samples, self.float_epochs, self.batch_size, self.float_rate, seed)

    def qat_schedule(self, seed: int) -> Schedule:
        """The same for all seeds' models, and other orders than in the float training."""
        return Schedule(self.train_samples, self.qat_epochs, self.batch_size, self.qat_rate, seed + 1000)

    def recipe(
        self,
        bits: int,
        ranges: RangeSource,
        *,
        batch_norm: Any = "fold_training",
        fold_statistics: FoldStatistics | None = None,
    ) -> Recipe:
        steps = self.qat_schedule(0).steps
        freeze = steps - round(self.frozen_share * steps) if batch_norm == "fold_training" else None
        return Recipe(
            weight_bits=bits,
            activation_bits=bits,
            ranges=ranges,
            batch_norm=batch_norm,
            fold_statistics=fold_statistics,
            freeze_bn_delay=freeze,
            overrides=(*FIRST_AND_LAST, *self._only_added()),
        )

    def _only_added(self) -> Iterator[Override]:
        """Results that only an addition reads: of a block's last convolution and of its shortcut."""
        for stage in range(len(self.widths)):
            for block in range(self.blocks):
                name = f"stage{stage + 1}.{block}"
                yield Override(match=f"{name}.2.conv", activation_bits=8)
                if stage and not block:
                    yield Override(match=f"{name}.shortcut.conv", activation_bits=8)


@dataclass(frozen=True)
class Run:
    """One model to make.

    `seed` is that of the initial weights and of the order of the samples, `folder` holds all of it.
    """

    settings: Settings
    seed: int
    folder: Path
    bits: int | None = None
    torch_python: str | None = None

    @property
    def source(self) -> Path:
        """The network with its initial weights."""
        return self.folder / "initial.onnx"

    @property
    def float_model(self) -> Path:
        return self.folder / "float.onnx"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.npz"

    def train_samples(self) -> Samples:
        return load_fashion_mnist().train.part(0, self.settings.train_samples)

    def test_samples(self) -> Samples:
        return load_fashion_mnist().test.part(0, self.settings.test_samples)


@dataclass(frozen=True)
class Outcome:
    """One model of one seed: top-1 in percent; CPU seconds and the loss of each step of its training."""

    method: str
    bits: int | None
    seed: int
    top1: float = float("nan")
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    error: str | None = None


# --- Float. ---


def float_model(run: Run) -> Outcome:
    """Train the network from scratch by our own path, with batch statistics; export it for inference."""
    settings, seed = run.settings, run.seed
    run.folder.mkdir(parents=True)
    network = resnet(settings.widths, settings.blocks, seed=seed, stem_stride=settings.stem_stride)
    onnx.save(network, run.source)
    load_fashion_mnist().calibration.save(run.calibration)
    training = _train_float(run, run.source, settings.float_schedule(seed), run.float_model)
    return _outcome(FLOAT, run, run.float_model, training)


def more_float(run: Run) -> Outcome:
    """Go on training in float with the schedule of the quantized models."""
    target = run.folder / "more_float.onnx"
    training = _train_float(run, run.float_model, run.settings.qat_schedule(run.seed), target)
    return _outcome(MORE_FLOAT, run, target, training)


def _train_float(run: Run, source: Path, schedule: Schedule, target: Path) -> Training:
    folder = run.folder / f"{target.stem}_training"
    folder.mkdir()
    recipe = Recipe(batch_norm="keep")
    model = load(source)
    normalize(model)
    folding = fold_batch_norms(model, recipe)  # none: it says which batch norms train
    write_training_artifacts(model, recipe, folder, folding=folding)
    training = train(folder, run.train_samples(), schedule)
    export_float(source, folder / TRAINED_CHECKPOINT, target)
    return training


# --- Quantized after training. ---


def static(run: Run) -> Outcome:
    """onnxruntime's quantize_static as its documentation has it: QDQ, MinMax, per-channel int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = _one_by_one(load_fashion_mnist().calibration.images)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._samples, None)

    preprocessed, target = run.folder / "preprocessed.onnx", run.folder / "static.onnx"
    quant_pre_process(run.float_model, preprocessed)
    quantize_static(
        preprocessed,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return _outcome(STATIC, run, target)


def _one_by_one(images: NDArray[np.float32]) -> Iterator[dict[str, NDArray[np.float32]]]:
    return ({INPUT_NAME: images[i : i + 1]} for i in range(CALIBRATION_SAMPLES))


def fixed(run: Run) -> Outcome:
    """Our calibrated ranges (mse), nothing trained."""
    recipe = run.settings.recipe(_bits(run), "fixed", batch_norm="fold_inference")
    bundle, target = _paths(run, "fixed")
    rewriter.prepare(run.float_model, bundle, recipe=recipe, calibration=run.calibration)
    rewriter.finalize(bundle, target)
    return _outcome(FIXED, run, target)


# --- Quantization-aware training. ---


def moving_average(run: Run) -> Outcome:
    return _qat(MOVING_AVERAGE, run, "moving_average")


def learned(run: Run) -> Outcome:
    return _qat(LEARNED, run, "learned")


def learned_float_layer(run: Run) -> Outcome:
    return _qat(LEARNED_FLOAT_LAYER, run, "learned", "float_layer")


def _qat(
    method: str, run: Run, ranges: RangeSource, fold_statistics: FoldStatistics | None = None
) -> Outcome:
    bundle, target = _paths(run, f"{ranges}-{fold_statistics}" if fold_statistics else ranges)
    recipe = run.settings.recipe(_bits(run), ranges, fold_statistics=fold_statistics)
    rewriter.prepare(run.float_model, bundle, recipe=recipe, calibration=run.calibration)
    training = train(bundle, run.train_samples(), run.settings.qat_schedule(run.seed))
    rewriter.finalize(bundle, target)
    return _outcome(method, run, target, training)


def torch_learned(run: Run) -> Outcome:
    """The same quantizers, start and schedule in PyTorch: see `benchmarks.fashion_torch`."""
    assert run.torch_python is not None
    folder, _ = _paths(run, "torch")
    folder.mkdir()
    recipe, schedule = run.settings.recipe(_bits(run), "learned"), run.settings.qat_schedule(run.seed)
    write_qat_program(run.float_model, recipe, run.calibration, folder)
    (folder / "schedule.json").write_text(json.dumps(dataclasses.asdict(schedule)))
    pixels = folder / "pixels.npz"
    train_samples, test_samples = run.train_samples(), run.test_samples()
    np.savez(
        pixels,
        train_pixels=train_samples.pixels,
        train_labels=train_samples.labels,
        test_pixels=test_samples.pixels,
        test_labels=test_samples.labels,
    )
    command = [run.torch_python, "-m", "benchmarks.fashion_torch", str(folder), str(pixels)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_REPOSITORY)
    pixels.unlink()
    if child.returncode:
        reason = next(filter(str.strip, reversed(child.stderr.splitlines())), "no message")
        return Outcome(TORCH, run.bits, run.seed, error=reason[:_LONGEST_ERROR])
    answer = json.loads(child.stdout.splitlines()[-1])
    return Outcome(TORCH, run.bits, run.seed, answer["top1"], answer["seconds"], tuple(answer["losses"]))


def _paths(run: Run, kind: str) -> tuple[Path, Path]:
    """A folder to train in and the model to write."""
    name = f"{kind}_{run.bits}"
    return run.folder / name, run.folder / f"{name}.onnx"


def _bits(run: Run) -> int:
    assert run.bits is not None
    return run.bits


def _outcome(method: str, run: Run, model: Path, training: Training | None = None) -> Outcome:
    seconds, losses = (0.0, ()) if training is None else (training.seconds, training.losses)
    return Outcome(method, run.bits, run.seed, evaluate(model, run.test_samples()), seconds, losses)


FLOAT: Final = "float"
MORE_FLOAT: Final = "float, trained as long"
STATIC: Final = "quantize_static"
FIXED: Final = "fixed ranges, not trained"
MOVING_AVERAGE: Final = "QAT, moving averages"
LEARNED: Final = "QAT, learned ranges"
LEARNED_FLOAT_LAYER: Final = "QAT, learned ranges, statistics of the float layer"
TORCH: Final = "PyTorch QAT, learned ranges"

# In the order of the table's rows; those in the second group have a model for each number of bits.
ONE_MODEL: Final[dict[str, Callable[[Run], Outcome]]] = {FLOAT: float_model, MORE_FLOAT: more_float}
PER_BITS: Final[dict[str, Callable[[Run], Outcome]]] = {
    STATIC: static,
    FIXED: fixed,
    MOVING_AVERAGE: moving_average,
    LEARNED: learned,
    LEARNED_FLOAT_LAYER: learned_float_layer,
    TORCH: torch_learned,
}
METHODS: Final = {**ONE_MODEL, **PER_BITS}
ON_REQUEST: Final = frozenset({LEARNED_FLOAT_LAYER})


def make(method: str, run: Run) -> Outcome:
    """The outcome of one model; that it cannot be made is one too."""
    try:
        return METHODS[method](run)
    except rewriter.QatError as error:
        print(f"{method}, {run.bits} bits, seed {run.seed}: {error}", file=sys.stderr)
        return Outcome(method, run.bits, run.seed, error=str(error)[:_LONGEST_ERROR])
