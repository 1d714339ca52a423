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
from examples.fashion_mnist import Samples
from rewriter import training_api
from rewriter.bundle import CHECKPOINT, EVAL_MODEL, OPTIMIZER_MODEL, TRAINED_CHECKPOINT, TRAINING_MODEL
from rewriter.training.checkpoint import read_checkpoint

_EVALUATION_BATCH: Final = 500


@dataclass(frozen=True)
class Training:
    """What a training did: the loss of each step, and the CPU seconds of all."""

    losses: tuple[float, ...]
    seconds: float


class Session:
    """What is in a bundle, loaded by the stock API on one thread."""

    def __init__(self, bundle: Path) -> None:
        api = training_api()
        options = single_thread()
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # train Q/DQ pairs as they are
        self.state = api.CheckpointState.load_checkpoint(bundle / CHECKPOINT)
        self.module = api.Module(bundle / TRAINING_MODEL, self.state, bundle / EVAL_MODEL, "cpu", options)
        self._optimizer = api.Optimizer(bundle / OPTIMIZER_MODEL, self.module)

    def train(self, samples: Samples, schedule: Schedule) -> Training:
        self.module.train()
        losses = []
        start = time.process_time()
        for step, batch in enumerate(schedule.batches(samples.pixels, samples.labels)):
            losses.append(float(np.ravel(self.module(*batch))[0]))
            self._optimizer.set_learning_rate(schedule.rate(step))
            self._optimizer.step()
            self.module.lazy_reset_grad()
        return Training(tuple(losses), time.process_time() - start)

    def top1(self, samples: Samples) -> float:
        """Top-1 of the eval model, whose outputs are the loss and the scores, in percent."""
        self.module.eval()
        batches = (samples.part(start, _EVALUATION_BATCH) for start in _starts(samples))
        scores = [self.module(batch.images, batch.labels)[1] for batch in batches]
        return top1(np.concatenate(scores), samples.labels)


def train(bundle: Path, samples: Samples, schedule: Schedule) -> Training:
    """Train a bundle and write its trained checkpoint."""
    session = Session(bundle)
    training = session.train(samples, schedule)
    training_api().CheckpointState.save_checkpoint(session.state, bundle / TRAINED_CHECKPOINT)
    return training


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
    """Top-1 of a model in plain onnxruntime with its default optimizations, in percent.

    Without the saturation of x86 without VNNI, which would make the table one of the machine's CPU.
    """
    options = single_thread()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = (samples.part(start, _EVALUATION_BATCH) for start in _starts(samples))
    scores: list[NDArray[Any]] = [session.run(None, {name: batch.images})[0] for batch in batches]
    return top1(np.concatenate(scores), samples.labels)


def _starts(samples: Samples) -> range:
    return range(0, len(samples.labels), _EVALUATION_BATCH)


def single_thread() -> onnxruntime.SessionOptions:
    """Trainings run side by side, one on each core: that is faster than one after the other on all cores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return options
