"""Gradients of real networks, along each parameter's own gradient, against finite differences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from gradient_check import session

from examples.models import model_path
from rewriter.gradients import differentiate, trainability
from rewriter.load import load
from rewriter.normalize import normalize


@pytest.mark.parametrize(("name", "shape"), [("mnist-conv", (2, 1, 28, 28)), ("ppocr2-cls", (1, 3, 48, 64))])
def test_directional_derivatives_of_every_parameter(name: str, shape: tuple[int, ...]) -> None:
    """dloss/dw along the unit vector of the gradient is the gradient's norm; loss = sum(scores * r)."""
    model = load(model_path(name))
    normalize(model)
    graph = model.graph
    scores = graph.outputs[0]
    if (producer := scores.producer()) is not None and producer.op_type == "Softmax":
        scores = producer.inputs[0]
        assert scores is not None
    r = ir.val("r", ir.DataType.FLOAT, None)
    product = ir.node("Mul", [scores, r], name="product")
    total = ir.node("ReduceSum", product.outputs, {"keepdims": 0}, name="total")
    graph.inputs.append(r)
    graph.extend([product, total])
    loss = total.outputs[0]

    candidates = [v for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    decided = trainability(graph, loss, candidates)
    assert all("BatchNormalization" in reason for reason in decided.frozen.values())
    parameters = [graph.initializers[n] for n in decided.trainable]
    gradients = differentiate(graph, loss, parameters)
    values = {p.name or "": p.const_value.numpy() for p in parameters if p.const_value is not None}
    graph.outputs[:] = [scores, *(gradients[p] for p in parameters)]
    for parameter in parameters:
        del graph.initializers[parameter.name or ""]
        parameter.const_value = None
        graph.inputs.append(parameter)
    runner = session(ir.to_proto(model))

    rng = np.random.default_rng(0)
    feeds = {graph.inputs[0].name: rng.random(shape).astype(np.float32), "r": np.zeros((), np.float32)}
    weights = rng.standard_normal(runner.run([scores.name], {**feeds, **values})[0].shape)
    computed = runner.run(None, {**feeds, **values, "r": weights.astype(np.float32)})[1:]

    def objective(name: str, value: np.ndarray) -> float:
        (moved,) = runner.run([scores.name], {**feeds, **values, name: value.astype(np.float32)})
        return float(np.vdot(moved.astype(np.float64), weights))

    for (name, value), gradient in zip(values.items(), computed, strict=True):
        norm = np.linalg.norm(gradient.astype(np.float64))
        # Long steps cross the kinks of Relu, short ones are rounding: one of them must agree.
        errors: list[float] = []
        for step in (1e-3, 3e-4, 3e-3, 1e-4):
            h = step * max(float(np.linalg.norm(value)), 1e-3)
            change = h * gradient / norm
            difference = (objective(name, value + change) - objective(name, value - change)) / (2 * h)
            errors.append(abs(difference - norm) / norm)
            if errors[-1] < 0.02:
                break
        assert errors[-1] < 0.02, (name, errors)
