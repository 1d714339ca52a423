"""Which initializers are parameters."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.quantization import IntegerRange
from rewriter.training.parameters import choose_parameters, matches
from tests.rewriter.training import nets


def tensor(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) / 100 + 0.1).astype(dtype)


def chosen(net: ir.Model) -> list[str | None]:
    return [value.name for value in choose_parameters(net.graph, ()).candidates]


def test_weights_biases_gains_and_position_tables_are_parameters() -> None:
    initializers = {
        "matmul": tensor(10, 10),
        "bias": tensor(10),
        "gain": tensor(1, 10),
        "position": tensor(4, 10),
        "gamma": tensor(10),
        "beta": tensor(10),
    }
    nodes = [
        nets.node("MatMul", ["x", "matmul"], "a"),
        nets.node("Add", ["bias", "a"], "b"),
        nets.node("Mul", ["b", "gain"], "c"),
        nets.node("Add", ["c", "position"], "d"),
        nets.node("LayerNormalization", ["d", "gamma", "beta"], "y"),
    ]
    net = nets.model(nodes, initializers, {"y": [4, 10]}, inputs={"x": [4, 10]})
    assert chosen(net) == list(initializers)


def test_a_weight_is_one_behind_its_quantizer() -> None:
    net = nets.mlp()
    nets.quantize(net, "W1", IntegerRange(-127, 127), np.float32(0.01), 0)
    assert chosen(net) == ["W1", "b1", "W2", "b2"]


def test_an_embedding_table_is_a_parameter_and_another_gathered_constant_is_not() -> None:
    initializers = {
        "table": tensor(12, 10),
        "list": tensor(12),
        "index": np.array([1, 2], np.int64),
    }
    nodes = [
        nets.node("Gather", ["table", "index"], "rows"),
        nets.node("Gather", ["list", "index"], "numbers"),
        nets.node("ReduceSum", ["numbers"], "total", keepdims=0),
        nets.node("Sub", ["rows", "total"], "y"),
    ]
    net = nets.model(nodes, initializers, {"y": [2, 10]})
    assert chosen(net) == ["table"]


@pytest.mark.parametrize(
    ("op_type", "constant"),
    [
        ("Mul", np.float32(0.7071)),
        ("Add", np.array([1e-5], np.float32)),
        ("Div", tensor(10)),
        ("Sub", tensor(10)),
        ("Pow", tensor(10)),
        ("Add", np.triu(np.full((10, 10), -1e9, np.float32))),
        ("Add", np.triu(np.full((10, 10), -np.inf, np.float32), 1)),
    ],
)
def test_constants_of_a_formula_are_not_parameters(op_type: str, constant: np.ndarray) -> None:
    net = nets.model([nets.node(op_type, ["x", "c"], "y")], {"c": constant}, {"y": [10, 10]}, {"x": [10, 10]})
    choice = choose_parameters(net.graph, ())
    assert choice.candidates == ()
    # A person is told about tensors, not about the scalars of a formula.
    assert list(choice.frozen) == (["c"] if np.size(constant) > 1 else [])


def test_running_statistics_are_not_parameters() -> None:
    names = ["gamma", "beta", "mean", "variance"]
    nodes = [nets.node("BatchNormalization", ["x", *names], "y")]
    shape = ["N", 10, 4]
    net = nets.model(nodes, {name: tensor(10) for name in names}, {"y": shape}, inputs={"x": shape})
    choice = choose_parameters(net.graph, ())
    assert [value.name for value in choice.candidates] == ["gamma", "beta"]
    assert choice.frozen["mean"] == "a constant, not a weight: input 3 of BatchNormalization 'node_y'"


def test_what_the_training_build_cannot_train_is_named() -> None:
    nodes = [
        nets.node("Cast", ["x"], "x64", to=11),
        nets.node("MatMul", ["x64", "double"], "y64"),
        nets.node("Cast", ["y64"], "y32", to=1),
        nets.node("MatMul", ["y32", "shown"], "y"),
    ]
    initializers = {"double": tensor(10, 10, dtype=np.float64), "shown": tensor(10, 4)}
    net = nets.model(nodes, initializers, {"y": ["N", 4]})
    net.graph.outputs.append(net.graph.initializers["shown"])
    choice = choose_parameters(net.graph, ())
    assert choice.candidates == ()
    assert choice.frozen == {
        "double": "DOUBLE is not trained, only float32 is",
        "shown": "it is also an output of the model",
    }


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("layer.1.weight", "layer.1.weight", True),
        ("layer.1.weight", "layer.1", True),
        ("layer.1.weight", "layer.", True),
        ("/layer/weight", "/layer", True),
        ("/layer/weight", "/", True),
        ("layer.10.weight", "layer.1", False),
        ("layer.1", "layer.1.weight", False),
        ("weights", "weight", False),
    ],
)
def test_prefixes_end_at_a_boundary(name: str, prefix: str, expected: bool) -> None:
    assert matches(name, prefix) == expected
