"""Checks the values of the parameters that layers and normalizations read: a fault is named where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import constant_array, initializer_array
from rewriter.operators import is_constant, is_operator

# Inputs that are parameters if they are constants.
_PARAMETERS: Final[Mapping[str, tuple[int, ...]]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2, 3, 4),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "LayerNormalization"), (1, 2)),
}


def check_parameters(graph: ir.Graph) -> None:
    """Check the float32 parameters of the main graph; each is read once.

    Raises:
        QatError: model_invalid: NaN or infinity, no elements, batch-norm parameters of different lengths, a
            variance that is not positive with epsilon added.
    """
    checked: set[ir.Value] = set()
    for node in graph:
        if node.domain != "" or node.op_type not in _PARAMETERS:
            continue
        for index in _PARAMETERS[node.op_type]:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None or not is_constant(value) or value.dtype != ir.DataType.FLOAT:
                continue
            if value not in checked:
                _check_values(value, node)
                checked.add(value)
        if is_operator(node, "BatchNormalization"):
            _check_batch_norm(node)


def _check_values(value: ir.Value, node: ir.Node) -> None:
    values = initializer_array(value)
    if values.size == 0:
        raise _invalid(node, f"Parameter {value.name!r} of {node.op_type} has no elements.")
    # min and max propagate NaN, and neither makes a copy.
    if not np.isfinite([values.min(), values.max()]).all():
        raise _invalid(node, f"Parameter {value.name!r} of {node.op_type} holds NaN or infinity; repair it.")


def _check_batch_norm(node: ir.Node) -> None:
    parameters = [value for value in node.inputs[1:5] if value is not None and is_constant(value)]
    sizes = [initializer_array(value).size for value in parameters]
    if len(set(sizes)) > 1:
        found = ", ".join(f"{v.name!r} {size}" for v, size in zip(parameters, sizes, strict=True))
        raise _invalid(node, f"The parameters of BatchNormalization have different lengths: {found}.")
    variance, epsilon = node.inputs[4], node.attributes.get_float("epsilon", 1e-5)
    values = constant_array(variance)
    if variance is None or values is None or node.attributes.get_int("training_mode", 0) == 1:
        return
    # In the precision of the variance, as runtimes add the two.
    if not (values + values.dtype.type(epsilon) > 0).all():
        raise _invalid(
            node,
            f"The variance {variance.name!r} of BatchNormalization is not positive in every channel, with "
            f"epsilon {epsilon:g} added: its result is not finite; repair it.",
        )


def _invalid(node: ir.Node, message: str) -> QatError:
    return QatError(ErrorCode.MODEL_INVALID, message, node=node.name)
