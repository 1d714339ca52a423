"""How scales are trained, and what else they could be: `benchmarks.fashion_mnist --parameterizations`.

    exp      s = s0 * exp(p), as in our bundles
    linear   s = s0 + p, that is, the scale itself is trained; nothing keeps it from crossing 0
    g        the scale's gradient times LSQ's factor g = 1 / sqrt(N * qmax), as in our bundles; or not

each with AdamW and with SGD. The other three are made of the bundle's own graphs: the node Exp that turns p
into the scale's multiplier is replaced, and what arrives at the parameter's accumulator is multiplied by what
dL/dp is more or less than it was. Everything else, zero points included, is as `rewriter.prepare` wrote it.

Loss: mean of the last quarter of the steps. Top-1: of the fake-quantized eval model. `crossed 0`: scales that
are 0 or negative at the end. `moved`: median of |log(s / s0)| over all scales, in percent.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import rewriter
from benchmarks.fashion_table import aligned
from benchmarks.fashion_training import Session
from benchmarks.fashion_variants import FLOAT, Run, Settings, make
from rewriter.bundle import EVAL_MODEL, QAT_MODEL, TRAINING_MODEL
from rewriter.manifest import Manifest, QuantizerEntry
from rewriter.recipe import OptimizerName
from rewriter.training import layout

Form = Literal["exp", "linear"]

BITS: Final = (8, 4, 2)
RATES: Final[dict[OptimizerName, tuple[float, ...]]] = {"adamw": (1e-3, 1e-2), "sgd": (1e-2, 1e-1)}


@dataclass(frozen=True)
class Parameterization:
    """What is trained in place of a scale."""

    form: Form
    factor: bool  # whether the gradient has LSQ's factor g

    def __str__(self) -> str:
        return f"{self.form}, {'g' if self.factor else 'no g'}"


OURS: Final = Parameterization("exp", True)  # what `rewriter.prepare` writes
PARAMETERIZATIONS: Final = (
    Parameterization("exp", True),
    Parameterization("exp", False),
    Parameterization("linear", True),
    Parameterization("linear", False),
)


@dataclass(frozen=True)
class Trial:
    """One training with one parameterization."""

    optimizer: OptimizerName
    rate: float
    bits: int
    parameterization: Parameterization


@dataclass(frozen=True)
class Result:
    """`loss`, `top1` in percent, scales that crossed 0, and how far scales moved; see the module."""

    trial: Trial
    seed: int
    loss: float
    top1: float
    crossed: int
    moved: float


def trials() -> Iterator[Trial]:
    for optimizer, rates in RATES.items():
        for bits, rate, parameterization in itertools.product(BITS, rates, PARAMETERIZATIONS):
            yield Trial(optimizer, rate, bits, parameterization)


def measure(settings: Settings, seeds: int, jobs: int, folder: Path) -> list[Result]:
    """Every trial from the float model of every seed, `jobs` at a time."""
    results: list[Result] = []
    runs = [Run(settings, seed, folder / f"seed{seed}") for seed in range(seeds)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for outcome in pool.map(make, itertools.repeat(FLOAT), runs):
            print(f"seed {outcome.seed}, float: {outcome.top1:.2f} %", file=sys.stderr, flush=True)
        jobs_to_do = list(itertools.product(runs, trials()))
        for result in pool.map(run_trial, *zip(*jobs_to_do, strict=True)):
            results.append(result)
            print(f"[{len(results)}/{len(jobs_to_do)}] {result}", file=sys.stderr, flush=True)
    return results


def run_trial(run: Run, trial: Trial) -> Result:
    """Train from the float model of the run."""
    settings = dataclasses.replace(run.settings, qat_rate=trial.rate)
    recipe = settings.recipe(trial.bits, "learned").model_copy(update={"optimizer": trial.optimizer})
    name = f"{trial.optimizer}_{trial.rate}_{trial.bits}_{trial.parameterization}".replace(", ", "_")
    bundle = run.folder / name.replace(" ", "_")
    manifest = rewriter.prepare(run.float_model, bundle, recipe=recipe, calibration=run.calibration)
    change_parameterization(bundle, manifest, trial.parameterization)
    session = Session(bundle)
    losses = session.train(run.train_samples(), settings.qat_schedule(run.seed)).losses
    parameters = {name: np.array(parameter.data) for name, parameter in session.state.parameters}
    scales = [
        (start, _scale(trial.parameterization.form, start, parameters[entry.scale_parameter]))
        for entry in manifest.quantizers
        if entry.scale_parameter is not None
        for start in [np.reshape(entry.initial_scale, parameters[entry.scale_parameter].shape)]
    ]
    crossed = sum(int((scale <= 0).sum()) for _, scale in scales)
    ratios = np.concatenate([np.ravel(scale / start) for start, scale in scales])
    moved = float(np.median(np.abs(np.log(ratios[ratios > 0])))) if (ratios > 0).any() else math.nan
    final_loss = float(np.mean(losses[-max(1, len(losses) // 4) :]))
    top1 = session.top1(run.test_samples())
    shutil.rmtree(bundle)
    return Result(trial, run.seed, final_loss, top1, crossed, 100 * moved)


def _scale(form: Form, start: NDArray[Any], parameter: NDArray[Any]) -> NDArray[Any]:
    scale: NDArray[Any] = start * np.exp(parameter) if form == "exp" else start + parameter
    return scale


def report(results: Sequence[Result]) -> str:
    """A line a trial; means over the seeds."""
    lines = [("optimizer", "rate", "bits", "scale", "loss", "top-1", "crossed 0", "moved, %")]
    for trial in dict.fromkeys(result.trial for result in results):
        found = [result for result in results if result.trial == trial]
        lines.append(
            (
                trial.optimizer,
                f"{trial.rate:g}",
                str(trial.bits),
                str(trial.parameterization),
                f"{statistics.mean(one.loss for one in found):.4f}",
                f"{statistics.mean(one.top1 for one in found):.2f}",
                str(sum(one.crossed for one in found)),
                f"{statistics.mean(one.moved for one in found):.1f}",
            )
        )
    return "\n".join(aligned(lines))


# --- Other parameterizations, in the graphs of a bundle. ---


def change_parameterization(bundle: Path, manifest: Manifest, wanted: Parameterization) -> None:
    """Rewrite the training and the eval model of a bundle, whose parameterization is `OURS`."""
    elements = _elements(bundle, manifest)
    learned = [entry for entry in manifest.quantizers if entry.scale_parameter is not None]
    for name in (TRAINING_MODEL, EVAL_MODEL):
        model = onnx.load(bundle / name)
        for entry in learned:
            assert entry.scale_parameter is not None
            initial = _initial_scale(model.graph, entry)
            if wanted.form == "linear":
                _make_linear(model.graph, entry.scale_parameter, initial)
            if name == TRAINING_MODEL:
                inverse = math.sqrt(elements[entry.name] * entry.qmax)
                factor = inverse ** (OURS.factor - wanted.factor)
                _scale_gradient(model.graph, entry, factor, divide=wanted.form == "linear")
        onnx.save(model, bundle / name)


def _node_index(graph: onnx.GraphProto, found: Iterable[bool]) -> int:
    (index,) = [index for index, right in enumerate(found) if right]
    return index


def _initial_scale(graph: onnx.GraphProto, entry: QuantizerEntry) -> str:
    """Name of the initializer s0, in scale = s0 * multiplier."""
    index = _node_index(graph, (list(node.output) == [entry.scale] for node in graph.node))
    initializers = {tensor.name for tensor in graph.initializer}
    (initial,) = initializers & set(graph.node[index].input)
    return str(initial)


def _make_linear(graph: onnx.GraphProto, parameter: str, initial: str) -> None:
    """multiplier = exp(p) becomes 1 + p / s0."""
    index = _node_index(
        graph, (node.op_type == "Exp" and list(node.input) == [parameter] for node in graph.node)
    )
    multiplier = graph.node[index].output[0]
    ratio, one = f"{multiplier}.ratio", f"{multiplier}.one"
    graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), one))
    nodes = [
        helper.make_node("Div", [parameter, initial], [ratio], name=ratio),
        helper.make_node("Add", [ratio, one], [multiplier], name=f"{multiplier}.linear"),
    ]
    _replace(graph, index, nodes)


def _scale_gradient(graph: onnx.GraphProto, entry: QuantizerEntry, factor: float, *, divide: bool) -> None:
    """Multiply dL/dp by `factor`, and divide it by the scale: exp's dL/dp is s * dL/ds, linear's is dL/ds."""
    done = f"{entry.scale_parameter}{layout.ACCUMULATED}"
    index = _node_index(graph, (list(node.output) == [done] for node in graph.node))
    accumulator = graph.node[index]
    gradient = accumulator.input[1]
    constant, product = f"{gradient}.factor", f"{gradient}.scaled"
    graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), constant))
    nodes = [helper.make_node("Mul", [gradient, constant], [product], name=product)]
    if divide:
        quotient = f"{gradient}.divided"
        nodes.append(helper.make_node("Div", [product, entry.scale], [quotient], name=quotient))
    accumulator.input[1] = nodes[-1].output[0]
    _replace(graph, index, [*nodes, accumulator])


def _replace(graph: onnx.GraphProto, index: int, nodes: list[onnx.NodeProto]) -> None:
    kept = list(graph.node)
    kept[index : index + 1] = nodes
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)


def _elements(bundle: Path, manifest: Manifest) -> dict[str, int]:
    """N of each quantizer: the elements that share a scale, of one sample where it is an activation."""
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle / QAT_MODEL))
    graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    elements = {}
    for entry in manifest.quantizers:
        shape = shapes[entry.tensors[0].tensor]
        shared = shape[1:] if entry.kind == "activation" else shape
        if entry.axis is not None:
            shared = [size for axis, size in enumerate(shape) if axis != entry.axis]
        elements[entry.name] = math.prod(shared)
    return elements
