"""Run a model on samples and observe its tensors, within a bound on the memory of their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy.typing as npt
import onnx_ir as ir

from rewriter.calibration.npz import Samples
from rewriter.calibration.observers import Extremes, NotFiniteError
from rewriter.calibration.session import TensorSession
from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import initializer_array
from rewriter.names import FreeNames
from rewriter.progress import Progress

# Bytes of observed values that one run of the model may return.
MEMORY_LIMIT: Final = 128 * 2**20

# Larger batches do not make the CPU faster, and the model's other tensors grow with them as well.
MAX_BATCH: Final = 16

ObserverByTensor = Mapping[str, Extremes]


def observe(
    model: ir.Model,
    observers: ObserverByTensor,
    samples: Samples,
    *,
    progress: Progress,
    memory_limit: int = MEMORY_LIMIT,
) -> None:
    """Update the observer of each tensor with its values on all samples.

    Tensors are graph inputs, initializers or node outputs of the main graph; several may share an observer.
    If the values of one sample exceed `memory_limit`, the tensors are observed in several passes over the
    samples (a single tensor beyond the limit is still observed, in a pass of its own).

    Raises:
        QatError: `run_failed` (also where the model computes NaN or infinity), `data_*`.
    """
    inputs = {value.name for value in model.graph.inputs}
    fed = {name: observer for name, observer in observers.items() if name in inputs}
    for name, observer in observers.items():
        if name not in inputs and name in model.graph.initializers:
            _update(observer, initializer_array(model.graph.initializers[name]), name, "the model")
    computed = [name for name in observers if name not in inputs and name not in model.graph.initializers]

    first = next(iter(samples.batches(1)), {})
    unit = _count(first) or 1
    sizes = _sizes(model, computed, first)
    passes = list(_passes(sizes, memory_limit)) or [[]]
    for index, tensors in enumerate(passes):
        session = TensorSession(model, tensors) if tensors else None
        total = sum(sizes[name] for name in tensors)
        batch_size = max(1, min(memory_limit // max(total // unit, 1), MAX_BATCH))
        done = 0
        for batch in samples.batches(batch_size):
            covered = f"samples {done} to {done + _count(batch) - 1}"
            for name, observer in fed.items() if index == 0 else ():
                _update(observer, batch[name], name, covered)
            if session is not None:
                for name, values in zip(tensors, session.run(batch, covered), strict=True):
                    _update(observers[name], values, name, covered)
            done += _count(batch)
            progress("calibrate", (index + min(done / len(samples), 1.0)) / len(passes))


def _sizes(model: ir.Model, tensors: Sequence[str], batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
    """Bytes of each tensor on a batch, as the model itself tells: shapes may depend on the values."""
    if not tensors:
        return {}
    counts = TensorSession(model, tensors, _append_sizes).run(batch, "the first sample")
    return {name: int(count) * 4 for name, count in zip(tensors, counts, strict=True)}


def _append_sizes(model: ir.Model, values: Sequence[ir.Value]) -> list[ir.Value]:
    names = FreeNames(model)
    outputs = []
    for value in values:
        name = names.take(f"{value.name}_size")
        output = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64))
        model.graph.append(ir.node("Size", [value], outputs=[output], name=name))
        outputs.append(output)
    return outputs


def _passes(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Consecutive tensors together up to `limit` bytes."""
    current: list[str] = []
    total = 0
    for name, size in sizes.items():
        if current and total + size > limit:
            yield current
            current, total = [], 0
        current.append(name)
        total += size
    if current:
        yield current


def _update(observer: Extremes, values: npt.NDArray[Any], name: str, samples: str) -> None:
    try:
        observer.update(values)
    except NotFiniteError as error:
        raise QatError(
            ErrorCode.RUN_FAILED,
            f"Tensor {name!r} holds NaN or infinity on {samples}, so that it has no range; leave the nodes "
            "that read it out with an override (quantize: false).",
        ) from error


def _count(batch: Mapping[str, npt.NDArray[Any]]) -> int:
    return len(next(iter(batch.values()))) if batch else 0
