"""Start values of every quantizer of a plan: weights from their values, activations from samples.

`QuantizerParameters.initialized` says where a range comes from:

    values                      a weight, from its values
    calibration:METHOD          samples (minmax, percentile, mse)
    batch_norm                  no samples: statistics of the folded batch norm
    bounds                      no samples: the operator bounds its result (Sigmoid, Clip, ...)
    uncalibrated:random_inputs  no samples: the model ran on random inputs
    uncalibrated:default        no samples, and the model does not run on random inputs: [-4, 4]
    uncalibrated:all_zero       the samples are all zero at this tensor: [-1, 1]

Asymmetric ranges are unsigned: [-4, 4] and [-1, 1] have their zero point in the middle.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.calibration.activations import MEMORY_LIMIT, observe
from rewriter.calibration.bias import make_room_for_biases
from rewriter.calibration.concat_ranges import Member, concat_inputs, concat_warning
from rewriter.calibration.known_ranges import known_ranges
from rewriter.calibration.npz import NpzSamples, Samples
from rewriter.calibration.observers import Extremes
from rewriter.calibration.random_samples import RandomSamples
from rewriter.calibration.ranges import Range, choose_range, new_observer
from rewriter.calibration.weights import weight_parameters
from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import initializer_array
from rewriter.progress import Progress, silent
from rewriter.quantization import Plan, Quantizer, QuantizerParameters, Statistics, parameters_from_range
from rewriter.recipe import Recipe

__all__ = ["NpzSamples", "Samples", "Statistics", "calibrate"]

_DEFAULT_RANGE: Final[Range] = (-4.0, 4.0)
_ALL_ZERO_RANGE: Final[Range] = (-1.0, 1.0)


def calibrate(
    model: ir.Model,
    plan: Plan,
    recipe: Recipe,
    samples: pathlib.Path | Samples | None,
    *,
    statistics: Statistics | None = None,
    progress: Progress = silent,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, QuantizerParameters]:
    """Start values of all quantizers of `plan` but the existing ones, by quantizer name.

    Same model, recipe and samples, same result, whatever `memory_limit` makes the batch size.

    Args:
        model: the normalized float model, before insertion; left as it is.
        samples: an npz file, samples, or None.
        statistics: mean and standard deviation per channel of tensors that batch norm normalized, by tensor
            name; used without samples only.
        memory_limit: bytes of observed values held at a time.

    Raises:
        QatError: `data_*`, `run_failed`, `model_invalid` (a weight holds NaN or infinity).
    """
    new = [quantizer for quantizer in plan.quantizers if not quantizer.existing]
    weights = {
        quantizer.name: weight_parameters(
            [_constant(model.graph, tensor.name) for tensor in quantizer.tensors], quantizer
        )
        for quantizer in new
        if quantizer.kind == "weight"
    }
    activations = [quantizer for quantizer in new if quantizer.kind == "activation"]
    if isinstance(samples, pathlib.Path):
        samples = NpzSamples.open(samples, model.graph.inputs)
    progress("calibrate", 0.0)
    if samples is None:
        found = _without_samples(model, activations, recipe, statistics or {}, progress, memory_limit)
    else:
        found = _from_samples(model, activations, recipe, samples, progress, memory_limit)
    parameters = weights | {
        quantizer.name: _parameters(quantizer, found[quantizer.name]) for quantizer in activations
    }
    progress("calibrate", 1.0)
    return make_room_for_biases(model.graph, plan, {q.name: parameters[q.name] for q in new})


@dataclasses.dataclass(frozen=True)
class _Origin:
    """A range, where it comes from, and what is wrong with it."""

    range: Range
    initialized: str
    warning: str | None = None


def _parameters(quantizer: Quantizer, origin: _Origin) -> QuantizerParameters:
    scale, zero_point = parameters_from_range(*origin.range, quantizer.range, symmetric=quantizer.symmetric)
    return QuantizerParameters(np.asarray(scale), np.asarray(zero_point), origin.initialized, origin.warning)


def _from_samples(
    model: ir.Model,
    quantizers: list[Quantizer],
    recipe: Recipe,
    samples: Samples,
    progress: Progress,
    memory_limit: int,
) -> dict[str, _Origin]:
    method = recipe.calibration.method
    observers = {quantizer.name: new_observer(method) for quantizer in quantizers}
    by_tensor: dict[str, Extremes] = {
        name: observers[quantizer.name] for quantizer in quantizers for name in _observed(quantizer)
    }
    concats = concat_inputs(model.graph, quantizers)
    for name in {name for inputs in concats.values() for group in inputs.values() for name in group}:
        if name in by_tensor:
            by_tensor[name] = Member(by_tensor[name])
    if by_tensor:
        observe(model, by_tensor, samples, progress=progress, memory_limit=memory_limit)
    found = {}
    for quantizer in quantizers:
        observer = observers[quantizer.name]
        if observer.low == observer.high == 0:
            found[quantizer.name] = _Origin(_ALL_ZERO_RANGE, "uncalibrated:all_zero")
            continue
        range_ = choose_range(observer, quantizer, recipe.calibration)
        warning = concat_warning(concats.get(quantizer.name, {}), by_tensor)
        found[quantizer.name] = _Origin(range_, f"calibration:{method}", warning)
    return found


def _without_samples(
    model: ir.Model,
    quantizers: list[Quantizer],
    recipe: Recipe,
    statistics: Statistics,
    progress: Progress,
    memory_limit: int,
) -> dict[str, _Origin]:
    by_bits = {
        bits: known_ranges(model.graph, statistics, bits)
        for bits in {quantizer.bits for quantizer in quantizers}
    }
    found: dict[str, _Origin] = {}
    for quantizer in quantizers:
        parts = [by_bits[quantizer.bits].get(name) for name in _observed(quantizer)]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts) and any(part.low < part.high for part in known):
            range_ = min(part.low for part in known), max(part.high for part in known)
            initialized = "batch_norm" if any(part.from_statistics for part in known) else "bounds"
            found[quantizer.name] = _Origin(range_, initialized)
    unknown = [quantizer for quantizer in quantizers if quantizer.name not in found]
    try:
        random = _from_samples(
            model, unknown, recipe, RandomSamples(model.graph.inputs), progress, memory_limit
        )
    except QatError as error:
        if error.code != ErrorCode.RUN_FAILED:
            raise
        default = _Origin(_DEFAULT_RANGE, "uncalibrated:default")
        return found | {quantizer.name: default for quantizer in unknown}
    return found | {
        name: dataclasses.replace(origin, initialized="uncalibrated:random_inputs", warning=None)
        if origin.initialized.startswith("calibration")
        else origin
        for name, origin in random.items()
    }


def _observed(quantizer: Quantizer) -> list[str]:
    """The tensors of a group that have values of their own: the rest repeat them."""
    own = [tensor.name for tensor in quantizer.tensors if not tensor.on_grid]
    return own or [tensor.name for tensor in quantizer.tensors]


def _constant(graph: ir.Graph, name: str) -> npt.NDArray[Any]:
    values = initializer_array(graph.initializers[name])
    # min and max propagate NaN, and neither makes a copy.
    if values.size and not np.isfinite([values.min(), values.max()]).all():
        raise QatError(ErrorCode.MODEL_INVALID, f"The weight {name!r} holds NaN or infinity; repair it.")
    return values
