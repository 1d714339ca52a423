"""Makes a batch size that is fixed at 1 dynamic, and proves that the model still computes the same.

Training needs batches; many models are exported for one sample. Most operators do not care about the size
of the first dimension, and what is in the way is usually a Reshape to a constant shape. Whether every
operator treats samples independently is not decided by rules: the model is run.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from rewriter.inference import session_options
from rewriter.initializers import add_initializer, constant_array
from rewriter.names import FreeNames
from rewriter.normalize.shapes import BATCH, InferShapesPass, forget_shapes

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ProofLimits:
    """Bounds on running the model.

    Attributes:
        seconds: for all runs together; when they are over, the batch size stays fixed.
        input_elements: elements of one sample, all inputs together.
    """

    seconds: float = 120.0
    input_elements: int = 64 * 2**20


class DynamicBatchPass(ir.passes.InPlacePass):
    """Replaces a first dimension of 1 by the symbol "batch", at all graph inputs together.

    1. Inputs of rank 2 or more get the symbol, if the first dimension of all of them is 1. Else the model
       stays as it is, with a warning if none is dynamic already.
    2. Reshape of a value that depends on such an input, to a constant shape: the first size becomes 0 (the
       same as the input's) or, where it is not, -1 with the other sizes known.
    3. Outputs follow: shapes are inferred again.
    4. Proof: in plain onnxruntime, single samples give what they gave before, and a batch gives the single
       results stacked. Without it the model is left as it was, with a warning.

    Attributes:
        inputs: names of the inputs that were made dynamic.
        warnings: why the batch size stayed fixed.
    """

    def __init__(self, limits: ProofLimits = ProofLimits()) -> None:
        super().__init__()
        self._limits = limits
        self.inputs: tuple[str, ...] = ()
        self.warnings: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.inputs, self.warnings = (), []
        fixed = _fixed_inputs(model.graph)
        batched = [v for v in model.graph.inputs if v.shape is not None and len(v.shape) > 1]
        other = [v for v in batched if v not in fixed]
        if not fixed or other:
            if batched and all(isinstance(_first_dim(v), int) for v in batched):
                sizes = ", ".join(f"{v.name!r}: {_first_dim(v)}" for v in batched)
                self.warnings.append(f"The batch size is fixed ({sizes}), also for training.")
            return ir.passes.PassResult(model, False)
        change = _Change(model, fixed)
        with tempfile.TemporaryDirectory(prefix="batch-") as folder:
            reason = self._prove(model, change, pathlib.Path(folder))
        if reason is not None:
            change.undo()
            self.warnings.append(f"The batch size stays fixed at 1: {reason}.")
            return ir.passes.PassResult(model, False)
        self.inputs = tuple(str(value.name) for value in fixed)
        return ir.passes.PassResult(model, True)

    def _prove(self, model: ir.Model, change: _Change, folder: pathlib.Path) -> str | None:
        """Carry `change` out; None if it is proved to be right, else the reason against it."""
        inputs = list(model.graph.inputs)
        elements = sum(_elements(value) or 0 for value in inputs)
        if any(_elements(value) is None for value in inputs):
            return "an input has a size or type that samples cannot be made for"
        if elements > self._limits.input_elements:
            return f"a sample has {elements} elements, too many to try batches"
        shared = _random_sample(inputs, seed=0)
        samples = [{**shared, **_random_sample(change.inputs, seed)} for seed in range(3)]
        runner = _Runner(self._limits.seconds)
        try:
            expected = runner.run(_write(model, folder / "fixed.onnx"), samples)
        except _RunError as error:
            return f"the model does not run on random data ({error})"
        try:
            change.do()
            # The first runs show how long they take: large models get the shortest batch.
            batch = samples if runner.elapsed < self._limits.seconds / 8 else samples[:2]
            feeds = [samples[0], _stack(change.names, batch)]
            single, stacked = runner.run(_write(model, folder / "dynamic.onnx"), feeds)
        except _RunError as error:
            return f"with more samples it does not run ({error})"
        count = len(batch)
        if not all(_close(a, b) for a, b in zip(single, expected[0], strict=True)):
            return "a single sample gives another result"
        for index, output in enumerate(model.graph.outputs):
            parts = [results[index] for results in expected[:count]]
            if parts[0].ndim == 0 or not _close(stacked[index], np.concatenate(parts)):
                return f"output {output.name!r} of a batch is not that of its samples, stacked"
        return None


class _Change:
    """The rewriting for a dynamic batch, and how to take it back."""

    def __init__(self, model: ir.Model, inputs: Sequence[ir.Value]) -> None:
        self._model = model
        self._names = FreeNames(model)
        self.inputs = inputs
        self._shapes = {
            value: value.shape
            for values in (model.graph.inputs, *(node.outputs for node in model.graph.all_nodes()))
            for value in values
        }
        self._reshapes: list[tuple[ir.Node, ir.Value]] = []
        self.names = tuple(str(value.name) for value in inputs)

    def do(self) -> None:
        graph = self._model.graph
        for node in _depending_on(self.inputs):
            if node.op_type == "Reshape" and node.domain == "" and node.graph is graph:
                self._adapt_reshape(node)
        forget_shapes(graph)
        for value in self.inputs:
            assert value.shape is not None
            value.shape = ir.Shape([BATCH, *value.shape[1:]])
        InferShapesPass()(self._model)

    def undo(self) -> None:
        for node, shape in self._reshapes:
            replaced = node.inputs[1]
            node.replace_input_with(1, shape)
            if replaced is not None and not replaced.uses():
                self._model.graph.initializers.pop(str(replaced.name))
        for value, old in self._shapes.items():
            value.shape = old

    def _adapt_reshape(self, node: ir.Node) -> None:
        x, shape = node.inputs
        target = constant_array(shape)
        if x is None or shape is None or target is None or target.size == 0:
            return
        sizes = [int(size) for size in target]
        if sizes[0] in (0, -1):
            return
        allow_zero = node.attributes.get_int("allowzero", 0)
        first = x.shape[0] if x.shape is not None and len(x.shape) else None
        if sizes[0] == first and not allow_zero:
            sizes[0] = 0
        else:
            if -1 in sizes[1:]:
                known = node.outputs[0].shape
                if known is None or not known.is_static():
                    return
                sizes[1:] = known.numpy()[1:]
            sizes[0] = -1
        self._reshapes.append((node, shape))
        name = self._names.take(f"{shape.name}_batch")
        node.replace_input_with(1, add_initializer(self._model.graph, name, np.array(sizes, np.int64)))


def _depending_on(inputs: Sequence[ir.Value]) -> list[ir.Node]:
    """Nodes that a value of the batch flows through; a Shape ends the flow."""
    found: dict[ir.Node, None] = {}
    pending = [node for value in inputs for node in value.consumers()]
    while pending:
        node = pending.pop()
        if node in found or node.op_type in ("Shape", "Size"):
            continue
        found[node] = None
        pending.extend(user for output in node.outputs for user in output.consumers())
    return list(found)


def _first_dim(value: ir.Value) -> int | None:
    """The first dimension of a value of rank 2 or more, if it is fixed."""
    if value.shape is None or len(value.shape) < 2:
        return None
    first = value.shape[0]
    return first if isinstance(first, int) else None


def _fixed_inputs(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.inputs if _first_dim(value) == 1]


# What an unknown dimension other than the batch is tried with: large enough for a few strided layers.
_TRIAL_SIZE: Final = 64


def _trial_shape(value: ir.Value) -> list[int] | None:
    if value.shape is None:
        return None
    unknown = [1, *[_TRIAL_SIZE] * (len(value.shape) - 1)]
    return [dim if isinstance(dim, int) else size for dim, size in zip(value.shape, unknown, strict=False)]


def _elements(value: ir.Value) -> int | None:
    """Elements of one sample; None where no sample can be made."""
    shape = _trial_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return int(np.prod(shape, dtype=object))


def _random_sample(inputs: Sequence[ir.Value], seed: int) -> dict[str, Array]:
    """Standard normal numbers; integers are 0 or 1, which are valid indices nearly everywhere."""
    rng = np.random.default_rng(seed)
    sample = {}
    for value in inputs:
        assert value.dtype is not None
        dtype, shape = value.dtype.numpy(), _trial_shape(value)
        drawn = rng.standard_normal(shape) if value.dtype.is_floating_point() else rng.integers(0, 2, shape)
        sample[str(value.name)] = drawn.astype(dtype)
    return sample


def _stack(names: Sequence[str], samples: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The samples as a batch; inputs without a batch dimension are those of the first sample."""
    stacked = dict(samples[0])
    for name in names:
        stacked[name] = np.concatenate([sample[name] for sample in samples])
    return stacked


def _close(actual: Array, expected: Array) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not np.issubdtype(expected.dtype, np.floating):
        return bool(np.array_equal(actual, expected))
    finite = expected[np.isfinite(expected)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(np.allclose(actual, expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))


def _write(model: ir.Model, path: pathlib.Path) -> pathlib.Path:
    """The model as a file; weights beside it, where onnxruntime maps them instead of copying them."""
    ir.save(model, path, external_data=f"{path.stem}.weights")
    return path


class _RunError(Exception):
    pass


class _Runner:
    """Runs models in plain onnxruntime within a common time limit."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.elapsed = 0.0

    def run(self, path: pathlib.Path, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
        start = time.monotonic()
        options = session_options(optimize=False)
        run_options = ort.RunOptions()
        timer = threading.Timer(max(self._seconds - self.elapsed, 0.0), _terminate, [run_options])
        timer.start()
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            return [session.run(None, dict(feed), run_options) for feed in feeds]
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise _RunError(" ".join(str(error).split())[:200]) from error
        finally:
            timer.cancel()
            self.elapsed += time.monotonic() - start


def _terminate(run_options: Any) -> None:
    run_options.terminate = True
