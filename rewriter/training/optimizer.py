"""The optimizer model: one AdamWOptimizer or SGDOptimizerV2 node, as onnxblock writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx
from onnx import TensorProto, helper

from rewriter.operators import MICROSOFT
from rewriter.recipe import OptimizerName

# The API feeds the inputs by name and expects exactly these; SGD has an unused moments input there too.
_NODES: Final[Mapping[OptimizerName, tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "adamw": (
        "AdamWOptimizer",
        ("params", "gradients", "first_order_moments", "second_order_moments"),
        (
            "learning_rate",
            "step",
            "params",
            "gradients",
            "first_order_moments",
            "second_order_moments",
        ),
    ),
    "sgd": (
        "SGDOptimizerV2",
        ("params", "gradients", "first_order_moments"),
        ("learning_rate", "params", "gradients"),
    ),
}

# Epsilon is 1e-8 where onnxblock writes 1e-6: the gradients of deep networks come near the latter. No weight
# decay by default, as there; adam_mode 1 applies the step before the (absent) decay.
_ATTRIBUTES: Final[Mapping[OptimizerName, dict[str, float | int]]] = {
    "adamw": {
        "alpha": 0.9,
        "beta": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.0,
        "correct_bias": 1,
        "adam_mode": 1,
    },
    "sgd": {},
}


def optimizer_model(optimizer: OptimizerName, *, opset: int, ir_version: int) -> onnx.ModelProto:
    """The model that `onnxruntime.training.api.Optimizer` runs to update float32 parameters."""
    op_type, sequences, inputs = _NODES[optimizer]
    node = helper.make_node(op_type, inputs, ["update_completed"], name=op_type, domain=MICROSOFT)
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in _ATTRIBUTES[optimizer].items()
    )
    graph = helper.make_graph(
        [node],
        "optimizer",
        [
            helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
            *(helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None) for name in sequences),
        ],
        [helper.make_tensor_value_info("update_completed", TensorProto.BOOL, [1])],
    )
    opsets = [helper.make_opsetid(MICROSOFT, 1), helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
