"""One way to add a constant to a graph, and one to read it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.initializers import add_initializer, constant_array
from tests.rewriter.graphs import graph


@pytest.mark.parametrize("values", [np.ones((2, 3), np.int8), np.float32(2.5), np.array(7)])
def test_an_added_constant_has_type_and_shape_of_its_values(values: np.ndarray) -> None:
    model = graph("g (float[2] x) => (y) { y = Neg(x) }")
    value = add_initializer(model.graph, "c", values)
    assert model.graph.initializers["c"] is value
    assert (value.dtype, value.shape) == (ir.DataType.from_numpy(values.dtype), values.shape)
    np.testing.assert_array_equal(constant_array(value), values)


def test_a_tensor_is_taken_as_it_is() -> None:
    tensor = ir.tensor(np.ones(4, np.float32))
    value = add_initializer(graph("g (float[2] x) => (y) { y = Neg(x) }").graph, "c", tensor)
    assert value.const_value is tensor
    assert tensor.name == "c"


def test_what_can_change_is_no_constant() -> None:
    model = graph("g (float[2] x) => (y) <float[2] w> { c = Constant<value_floats=[1.0, 2.0]>() "
                  "a = Add(x, w) y = Add(a, c) }")  # fmt: skip
    constant, add = model.graph[0], model.graph[1]
    np.testing.assert_array_equal(constant_array(constant.outputs[0]), [1, 2])
    assert constant_array(add.inputs[1]) is not None
    assert constant_array(add.inputs[0]) is None
    assert constant_array(add.outputs[0]) is None
    assert constant_array(None) is None
    model.graph.inputs.append(model.graph.initializers["w"])
    assert constant_array(add.inputs[1]) is None


def test_strings_are_no_numbers() -> None:
    model = graph("g (float[2] x) => (y) { y = Neg(x) }")
    value = ir.Value(name="s", const_value=ir.StringTensor(np.array([b"a"]), name="s"))
    model.graph.register_initializer(value)
    assert constant_array(value) is None
