"""Compares the gradients of `differentiate` with finite differences, both run by onnxruntime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from rewriter.gradients import differentiate
from rewriter.recipe import TrainingDevice

STEP = 0.02

# How much of the shapes the model says. static: all of it. named: one symbol per size, so that equal
# dimensions are provably equal. symbolic: the rank alone. rankless: nothing. Besides, batch: all but the
# first axis of the first input.
SHAPES = ("static", "named", "symbolic", "rankless")


@dataclasses.dataclass(frozen=True)
class Case:
    """One node and the values of its inputs.

    Attributes:
        inputs: by input position; float32 arrays are differentiated unless `constants` names their
            position; integer and bool arrays are fed; None is an omitted input.
        constants: positions that are initializers.
        shapes: how the shapes of the fed inputs may be given.
        differentiated: positions whose gradients are compared; None: all fed float32 inputs.
    """

    name: str
    op_type: str
    inputs: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: tuple[int, ...] = ()
    outputs: int = 1
    used_outputs: tuple[int, ...] = (0,)
    shapes: tuple[str, ...] = ("static", "symbolic")
    differentiated: tuple[int, ...] | None = None
    domain: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def wrt(self) -> tuple[int, ...]:
        if self.differentiated is not None:
            return self.differentiated
        return tuple(
            i
            for i, a in enumerate(self.inputs)
            if a is not None and i not in self.constants and a.dtype == np.float32
        )


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def forward_model(case: Case, shapes: str) -> onnx.ModelProto:
    """y_k = op(inputs), loss = sum_k sum(y_k * r_k)."""
    feeds, initializers = [], []
    for i, array in enumerate(case.inputs):
        if array is None:
            continue
        if i in case.constants:
            initializers.append(numpy_helper.from_array(array, f"i{i}"))
        else:
            feeds.append(_value_info(f"i{i}", array, shapes))
    names = ["" if a is None else f"i{i}" for i, a in enumerate(case.inputs)]
    outputs = [f"y{k}" for k in range(case.outputs)]
    nodes = [
        helper.make_node(case.op_type, names, outputs, name="node", domain=case.domain, **case.attributes)
    ]
    total = ""
    for k in case.used_outputs:
        feeds.append(helper.make_tensor_value_info(f"r{k}", TensorProto.FLOAT, None))
        nodes.append(helper.make_node("Mul", [f"y{k}", f"r{k}"], [f"p{k}"], name=f"weigh{k}"))
        nodes.append(helper.make_node("ReduceSum", [f"p{k}"], [f"s{k}"], name=f"sum{k}", keepdims=0))
        if total:
            nodes.append(helper.make_node("Add", [total, f"s{k}"], [f"t{k}"], name=f"add{k}"))
        total = f"t{k}" if total else f"s{k}"
    nodes[-1].output[0] = "loss"
    ys = [helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, None) for k in case.used_outputs]
    graph = helper.make_graph(
        nodes, "g", feeds, [helper.make_tensor_value_info("loss", TensorProto.FLOAT, []), *ys], initializers
    )
    return onnx.shape_inference.infer_shapes(as_model(graph))


def as_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def with_gradients(
    model: onnx.ModelProto, wrt: Sequence[str], device: TrainingDevice = "any"
) -> onnx.ModelProto:
    """The model with one more output per name of `wrt`, called `d_{name}`."""
    ir_model = ir.from_proto(model)
    graph = ir_model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    loss = next(value for value in graph.outputs if value.name == "loss")
    gradients = differentiate(graph, loss, [values[name] for name in wrt], device=device)
    for name in wrt:
        gradient = gradients[values[name]]
        assert gradient.dtype == ir.DataType.FLOAT
        gradient.name = f"d_{name}"
        graph.outputs.append(gradient)
    return ir.to_proto(ir_model)


def check(
    case: Case, shapes: str, tolerance: float = 1e-3, device: TrainingDevice = "any"
) -> onnx.ModelProto:
    """Asserts that each gradient is within `tolerance` of finite differences, relative to its largest."""
    rng = np.random.default_rng(7)
    model = forward_model(case, shapes)
    feeds = {f"i{i}": a for i, a in enumerate(case.inputs) if a is not None and i not in case.constants}
    forward = session(model)
    ys = [f"y{k}" for k in case.used_outputs]
    missing = {f"r{k}": np.zeros((), np.float32) for k in case.used_outputs}
    weights = [rng.standard_normal(y.shape) for y in forward.run(ys, {**feeds, **missing})]
    weight_feeds = {f"r{k}": w.astype(np.float32) for k, w in zip(case.used_outputs, weights, strict=True)}
    wrt = [f"i{i}" for i in case.wrt]
    gradient_model = with_gradients(model, wrt, device)
    computed = session(gradient_model).run([f"d_{name}" for name in wrt], {**feeds, **weight_feeds})
    for name, gradient in zip(wrt, computed, strict=True):
        expected = finite_differences(
            forward, {**feeds, **weight_feeds}, name, ys, list(weight_feeds.values())
        )
        assert gradient.shape == expected.shape
        scale = max(np.abs(expected).max(initial=0), 1e-3)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance * scale, err_msg=f"d{name}")
    return gradient_model


def finite_differences(
    forward: onnxruntime.InferenceSession,
    feeds: Mapping[str, np.ndarray],
    name: str,
    outputs: Sequence[str],
    weights: Sequence[np.ndarray],
) -> np.ndarray:
    """d sum(outputs * weights) / d feeds[name] by fourth-order central differences, summed in float64."""
    base = feeds[name]
    result = np.zeros(base.shape, np.float64)
    for index in np.ndindex(base.shape):
        total = 0.0
        for steps, coefficient in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
            moved = base.copy()
            moved[index] += steps * STEP
            ys = forward.run(list(outputs), {**feeds, name: moved})
            value = sum(np.vdot(y.astype(np.float64), w) for y, w in zip(ys, weights, strict=True))
            total += coefficient * value
        result[index] = total / (12 * STEP)
    return result


def _value_info(name: str, array: np.ndarray, shapes: str) -> onnx.ValueInfoProto:
    dims: list[Any] | None = {
        "static": list(array.shape),
        "named": [d if d == 1 else f"d{d}" for d in array.shape],
        "symbolic": [f"{name}_{axis}" for axis in range(array.ndim)],
        "rankless": None,
        "batch": ["N", *array.shape[1:]] if name == "i0" else list(array.shape),
    }[shapes]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), dims)
