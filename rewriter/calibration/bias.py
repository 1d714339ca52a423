"""Weight scales that leave the int32 bias of the finalized model room.

The bias of a layer becomes round(bias / (input scale * weight scale)) in int32. A channel with tiny weights
and an ordinary bias overflows it, so its scale is raised: its weights then use fewer integers, which the bias
hides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.operators import traits_of
from rewriter.quantization import Plan, QuantizerParameters

# Largest integer that a bias may start with. 2^7 below the end of int32, which training may use up.
# Raising a scale to this point moves a weight by at most 2^-25 of the bias per input step.
LARGEST_BIAS = 2**24


def make_room_for_biases(
    graph: ir.Graph, plan: Plan, parameters: Mapping[str, QuantizerParameters]
) -> dict[str, QuantizerParameters]:
    """`parameters` with weight scales raised where |bias| / (input scale * weight scale) > LARGEST_BIAS."""
    result = dict(parameters)
    quantizers = {
        (tensor.name, node): q for q in plan.quantizers for tensor in q.tensors for node in tensor.consumers
    }
    for node in graph:
        traits = traits_of(node)
        if traits is None or traits.weight is None or traits.bias is None:
            continue
        bias = _constant(node, traits.bias)
        data, weight = (
            quantizers.get((_name(node.inputs[index]), node.name or ""))
            for index in (traits.data, traits.weight)
        )
        if bias is None or data is None or weight is None or weight.kind != "weight":
            continue
        if data.name in result and weight.name in result:
            result[weight.name] = _raised(result[weight.name], result[data.name], bias)
    return result


def _raised(
    parameters: QuantizerParameters,
    data: QuantizerParameters,
    bias: npt.NDArray[np.float64],
) -> QuantizerParameters:
    magnitude = np.abs(bias)
    if parameters.scale.ndim == 0:
        magnitude = np.max(magnitude, initial=0.0)
    elif magnitude.size != parameters.scale.size:
        return parameters  # grouped ConvTranspose: channels of the weight are not those of the bias
    floor = magnitude / (np.float64(data.scale) * LARGEST_BIAS)
    scale = np.asarray(np.maximum(parameters.scale, floor), np.float32)
    return dataclasses.replace(parameters, scale=scale)


def _constant(node: ir.Node, index: int) -> npt.NDArray[np.float64] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    array = constant_array(value)
    return None if array is None else array.astype(np.float64).reshape(-1)


def _name(value: ir.Value | None) -> str:
    return "" if value is None or value.name is None else value.name
