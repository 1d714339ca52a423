"""Trains and evaluates the models of `benchmarks.fashion_mnist` with onnxruntime, one thread a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks.fashion_schedule import Schedule, top1
from examples.fashion_mnist import Samples, scaled
from rewriter import training_api
from rewriter.bundle import CHECKPOINT, EVAL_MODEL, OPTIMIZER_MODEL, TRAINED_CHECKPOINT, TRAINING_MODEL
from rewriter.training.checkpoint import read_checkpoint

_EVALUATION_BATCH: Final = 500


@dataclass(frozen=True)
class Training:
    """What a training did: mean loss of each epoch; seconds of the steps alone."""

    losses: tuple[float, ...]
    seconds: float


def train(bundle: Path, samples: Samples, schedule: Schedule) -> Training:
    """Train what is in `bundle` with the stock API and write its trained checkpoint there."""
    api = training_api()
    state = api.CheckpointState.load_checkpoint(bundle / CHECKPOINT)
    options = single_thread()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # train Q/DQ pairs as they are
    module = api.Module(bundle / TRAINING_MODEL, state, bundle / EVAL_MODEL, "cpu", options)
    optimizer = api.Optimizer(bundle / OPTIMIZER_MODEL, module)
    module.train()
    losses = []
    start = time.perf_counter()
    for step, batch in enumerate(schedule.batches(samples.pixels, samples.labels)):
        losses.append(float(np.ravel(module(*batch))[0]))
        optimizer.set_learning_rate(schedule.rate(step))
        optimizer.step()
        module.lazy_reset_grad()
    seconds = time.perf_counter() - start
    api.CheckpointState.save_checkpoint(state, bundle / TRAINED_CHECKPOINT)
    per_epoch = np.reshape(losses, (schedule.epochs, schedule.steps_per_epoch)).mean(axis=1)
    return Training(tuple(per_epoch.tolist()), seconds)


def export_float(source: Path, checkpoint: Path, target: Path) -> None:
    """Write the float model `source` with the weights and running statistics of a checkpoint."""
    model = onnx.load(source)
    parameters = read_checkpoint(checkpoint)
    for tensor in model.graph.initializer:
        trained = parameters.get(tensor.name)
        if trained is not None:
            assert list(trained.shape) == list(tensor.dims), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(trained, tensor.name))
    onnx.save(model, target)


def evaluate(model: Path, samples: Samples) -> float:
    """Top-1 of a model in plain onnxruntime with its default optimizations, in percent."""
    session = onnxruntime.InferenceSession(model, single_thread(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    starts = range(0, len(samples.pixels), _EVALUATION_BATCH)
    scores: list[NDArray[Any]] = [
        session.run(None, {name: scaled(samples.pixels[start : start + _EVALUATION_BATCH])})[0]
        for start in starts
    ]
    return top1(np.concatenate(scores), samples.labels)


def single_thread() -> onnxruntime.SessionOptions:
    """Trainings run side by side, one on each core: that is faster than one after the other on all cores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return options
