"""The networks and variants of `benchmarks.train_step`, each written as a folder that a process can train."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

import rewriter
from benchmarks.resnet import CLASSES, IMAGE, resnet
from benchmarks.torch_program import write_torch_program
from examples.models import model_path
from rewriter.bundle import OPTIMIZER_MODEL
from rewriter.calibration import calibrate
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.insertion import insert
from rewriter.load import load
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.recipe import GraphLoss, LossName, Recipe, TrainingDevice
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.losses import attach_loss
from rewriter.training.runtime import without_pytorch

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Network:
    """A float model, its loss, and how to make a batch of inputs and targets."""

    write: Callable[[Path, int], None]
    loss: LossName | GraphLoss
    inputs: Callable[[np.random.Generator, int], Arrays]
    targets: Callable[[np.random.Generator, int], Arrays]
    batch: int


# --- The networks. ---

_LENGTH: Final = 64  # tokens in a sentence
_EMBEDDING = "461"  # the sentence embedding of minilm-l3; its other outputs are hidden states and its inputs
_FEATURES: Final = 384


def _write_minilm(path: Path, batch: int) -> None:
    """minilm-l3 with constant batch and length, what follows from them computed, and one output."""
    model = onnx.load(model_path("minilm-l3"))
    sizes = {"batch_size": batch, "sequence_length": _LENGTH}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = sizes[dim.dim_param]
    kept = [value for value in model.graph.output if value.name == _EMBEDDING]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["MatMulAddFusion"],  # constants only: the layers stay as exported
    )


def _write_resnet(path: Path, batch: int) -> None:
    onnx.save(resnet(), path)


NETWORKS: Final[Mapping[str, Network]] = {
    "resnet": Network(
        _write_resnet,
        "cross_entropy",
        lambda random, batch: {"images": random.random((batch, *IMAGE), np.float32)},
        lambda random, batch: {"labels": random.integers(0, CLASSES, batch)},
        batch=64,
    ),
    "minilm-l3": Network(
        _write_minilm,
        GraphLoss(output=_EMBEDDING, kind="mse"),
        lambda random, batch: {
            "input_ids": random.integers(1000, 30000, (batch, _LENGTH)),
            "attention_mask": np.ones((batch, _LENGTH), np.int64),
        },
        lambda random, batch: {"targets": random.standard_normal((batch, _FEATURES), np.float32)},
        batch=16,
    ),
}


_NEWEST_IR: Final = 10


# --- The variants: each writes what its process reads into a folder. ---


@dataclass(frozen=True)
class Job:
    """One network, written once for all its variants."""

    network: Network
    model: Path
    samples: Path  # one batch of inputs, also for calibration
    feeds: Path  # inputs and targets

    @classmethod
    def write(cls, network: Network, batch: int, folder: Path) -> Job:
        job = cls(network, folder / "model.onnx", folder / "samples.npz", folder / "feeds.npz")
        random = np.random.default_rng(0)
        inputs, targets = network.inputs(random, batch), network.targets(random, batch)
        network.write(job.model, batch)
        np.savez(job.samples, **inputs)  # type: ignore[arg-type]
        np.savez(job.feeds, **inputs, **targets)  # type: ignore[arg-type]
        return job

    def float_model(self) -> ir.Model:
        """Normalized and folded as `prepare` does it, without quantizers."""
        model = load(self.model)
        normalize(model)
        fold_batch_norms(model)
        return model


def _float_stock(job: Job, folder: Path) -> None:
    """The same float graph and loss, differentiated by generate_artifacts."""
    trainable = _float(job, folder)
    _generate_artifacts(job, job.float_model(), trainable, [], folder)


def _batch_norm_stock(job: Job, folder: Path) -> None:
    """The same with batch norms that normalize with the statistics of the batch, by onnxruntime's kernels."""
    trainable, state = _batch_norm(job, folder)
    model = load(job.model)
    normalize(model)
    _generate_artifacts(job, model, trainable, state, folder)


def _generate_artifacts(
    job: Job, model: ir.Model, trainable: Sequence[str], frozen: Sequence[str], folder: Path
) -> None:
    with without_pytorch():
        from onnxruntime.training import artifacts

    loss = attach_loss(model, job.network.loss).loss
    model.graph.outputs[:] = [loss]
    for node in model.graph:
        if node.op_type == "LayerNormalization":  # its gradient there needs all three outputs
            node.resize_outputs(3)
            for value, name in zip(node.outputs[1:], ("mean", "inverse_deviation"), strict=True):
                value.name, value.type = f"{node.name}/{name}", ir.TensorType(ir.DataType.FLOAT)
    logging.disable(logging.INFO)
    onnxruntime.set_default_logger_severity(3)
    try:
        artifacts.generate_artifacts(
            ir.to_proto(model),
            requires_grad=list(trainable),
            frozen_params=list(frozen),
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=folder,
        )
    finally:
        logging.disable(logging.NOTSET)
    optimizer = onnx.load(folder / OPTIMIZER_MODEL)
    optimizer.ir_version = min(optimizer.ir_version, _NEWEST_IR)  # onnx's newest, which onnxruntime refuses
    onnx.save(optimizer, folder / OPTIMIZER_MODEL)


def _float(job: Job, folder: Path, device: TrainingDevice = "any") -> tuple[str, ...]:
    recipe = Recipe(loss=job.network.loss, batch_norm="fold_inference", training_device=device)
    return write_training_artifacts(job.float_model(), recipe, folder).trainable


def _batch_norm(job: Job, folder: Path) -> tuple[tuple[str, ...], list[str]]:
    """Float, with batch norms that train: the parameters, and the running statistics."""
    model, recipe = load(job.model), Recipe(loss=job.network.loss, batch_norm="keep")
    normalize(model)
    folding = fold_batch_norms(model, recipe)
    report = write_training_artifacts(model, recipe, folder, folding=folding)
    return report.trainable, [name for name in report.state if name != report.step_counter]


def _bundle(**settings: Any) -> Callable[[Job, Path], object]:
    def write(job: Job, folder: Path) -> None:
        recipe = Recipe(**({"batch_norm": "fold_inference"} | settings), loss=job.network.loss)
        rewriter.prepare(job.model, folder, recipe=recipe, calibration=job.samples, replace=True)

    return write


def _torch_float(job: Job, folder: Path) -> None:
    trainable = _float(job, folder)
    write_torch_program(job.float_model(), job.network.loss, trainable, folder)


def _torch_learned(job: Job, folder: Path) -> None:
    """The quantizers of our "learned W8A8", inserted as `prepare` does it."""
    trainable, recipe, model = _float(job, folder), Recipe(), job.float_model()
    plan = place(model, recipe)
    insert(model, plan, calibrate(model, plan, recipe, job.samples))
    write_torch_program(model, job.network.loss, trainable, folder)


VARIANTS: Final[Mapping[str, Callable[[Job, Path], object]]] = {
    "float, stock": _float_stock,
    "float": _float,
    "float, for the CPU": lambda job, folder: _float(job, folder, "cpu"),
    "float, batch norm, stock": _batch_norm_stock,
    "float, batch norm": _batch_norm,
    "learned W8A8": _bundle(),
    "learned W8A8, for the CPU": _bundle(training_device="cpu"),
    "learned W4A4": _bundle(weight_bits=4, activation_bits=4),
    "fixed W8A8": _bundle(ranges="fixed"),
    "moving average W8A8": _bundle(ranges="moving_average"),
    "learned W8A8, fold in training": _bundle(batch_norm="fold_training"),
    "learned W8A8, fold in training, float layer": _bundle(
        batch_norm="fold_training", fold_statistics="float_layer"
    ),
    "moving average W8A8, fold in training": _bundle(ranges="moving_average", batch_norm="fold_training"),
}
TORCH_VARIANTS: Final[Mapping[str, Callable[[Job, Path], object]]] = {
    "torch float": _torch_float,
    "torch learned W8A8": _torch_learned,
}


def write_variant(name: str, job: Job, folder: Path) -> None:
    """Write the variant's artifacts and its batch into `folder`, which must not exist.

    Raises:
        QatError: it cannot be prepared (yet).
    """
    folder.mkdir()
    write = VARIANTS[name] if name in VARIANTS else TORCH_VARIANTS[name]
    write(job, folder)
    shutil.copy(job.feeds, folder / "feeds.npz")
