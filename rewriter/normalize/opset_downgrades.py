"""What changed in ONNX operators after opset 18, and how a node of a newer opset is written in 18.

`normalize.adapters` says what an adapter is. Attributes at their default are dropped; an attribute that says
something opset 18 cannot express stays, and the check of the pass then names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.names import FreeNames
from rewriter.normalize.adapters import (
    Adapter,
    constant,
    drop,
    drop_default,
    input_type,
    number,
    pop,
    refuse_value,
    replace,
    set_input,
    unsupported,
)


def _average_pool_dilations(node: ir.Node, names: FreeNames) -> ir.Node:
    if "dilations" in node.attributes and set(node.attributes["dilations"].value) <= {1}:
        node.attributes.pop("dilations")
    return node


def _output_dtype(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 21/23: the type can be an attribute; in 18 the zero point (Q) or the scale (DQ) says it."""
    drop_default(block_size=0, output_dtype=0, precision=0)(node, names)
    scale = node.inputs[1]
    output_dtype = node.attributes.get("output_dtype")
    if output_dtype is None or scale is None:
        return node
    dtype = ir.DataType(output_dtype.value)
    if node.op_type == "DequantizeLinear":
        if dtype == scale.dtype:
            node.attributes.pop("output_dtype")
    elif len(node.inputs) > 2 and node.inputs[2] is not None:
        node.attributes.pop("output_dtype")
    elif scale.shape is not None and scale.shape.is_static():
        node.attributes.pop("output_dtype")
        set_input(node, names, 2, np.zeros(scale.shape.numpy(), dtype.numpy()), "zero_point")
    return node


def _grid_sample_mode(node: ir.Node, names: FreeNames) -> ir.Node:
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4:
        raise unsupported(node, "only images (4-D) are defined in opset 18")
    mode = pop(node, "mode", "linear")
    node.attributes["mode"] = ir.AttrString(
        "mode", {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    )
    return node


def _gelu(node: ir.Node, names: FreeNames) -> None:
    """y = x * (0.5 * (1 + erf(x / sqrt 2))), or the tanh approximation; ONNX operator Gelu."""
    x = node.inputs[0]
    half, one = number(node, names, "half", 0.5), number(node, names, "one", 1.0)
    if pop(node, "approximate", "none") == "none":
        inner = [ir.node("Div", [x, number(node, names, "sqrt_2", math.sqrt(2))])]
        inner.append(ir.node("Erf", [inner[-1].outputs[0]]))
    else:
        three, cubic = number(node, names, "three", 3.0), number(node, names, "cubic", 0.044715)
        inner = [ir.node("Pow", [x, three])]
        inner.append(ir.node("Mul", [inner[-1].outputs[0], cubic]))
        inner.append(ir.node("Add", [x, inner[-1].outputs[0]]))
        root = number(node, names, "sqrt_2_over_pi", math.sqrt(2 / math.pi))
        inner.append(ir.node("Mul", [inner[-1].outputs[0], root]))
        inner.append(ir.node("Tanh", [inner[-1].outputs[0]]))
    plus_one = ir.node("Add", [inner[-1].outputs[0], one])
    halved = ir.node("Mul", [plus_one.outputs[0], half])
    product = ir.node("Mul", [x, halved.outputs[0]], name=node.name)
    replace(node, names, [*inner, plus_one, halved, product])


def _swish(node: ir.Node, names: FreeNames) -> None:
    """y = x * sigmoid(alpha * x)."""
    x = node.inputs[0]
    alpha = pop(node, "alpha", 1.0)
    nodes = [] if alpha == 1.0 else [ir.node("Mul", [x, number(node, names, "alpha", alpha)])]
    nodes.append(ir.node("Sigmoid", [nodes[-1].outputs[0] if nodes else x]))
    product = ir.node("Mul", [x, nodes[-1].outputs[0]], name=node.name)
    replace(node, names, [*nodes, product])


def _rms_normalization(node: ir.Node, names: FreeNames) -> None:
    """y = x / sqrt(mean(x^2) + epsilon) * scale, the mean over the dimensions from `axis` on."""
    x, scale = node.inputs[:2]
    axis = pop(node, "axis", -1)
    rank = None if x is None or x.shape is None else len(x.shape)
    if axis != -1 and rank is None:
        raise unsupported(node, "the rank of its input is not known")
    first = axis if axis < 0 else axis - (rank or 0)
    axes = constant(node, names, "axes", np.arange(first, 0, dtype=np.int64))
    square = ir.node("Mul", [x, x])
    mean = ir.node("ReduceMean", [square.outputs[0], axes], {"keepdims": 1})
    epsilon = number(node, names, "epsilon", pop(node, "epsilon", 1e-5))
    shifted = ir.node("Add", [mean.outputs[0], epsilon])
    root = ir.node("Sqrt", [shifted.outputs[0]])
    normalized = ir.node("Div", [x, root.outputs[0]])
    scaled = ir.node("Mul", [normalized.outputs[0], scale], name=node.name)
    replace(node, names, [square, mean, shifted, root, normalized, scaled])


def _group_normalization(node: ir.Node, names: FreeNames) -> None:
    """Each group normalized as one instance, then scale and bias per channel."""
    x, scale, bias = node.inputs
    if x is None or x.shape is None:
        raise unsupported(node, "the rank of its input is not known")
    groups = pop(node, "num_groups")
    dtype = input_type(node)
    grouped_shape = constant(node, names, "grouped", np.array([0, groups, -1], np.int64))
    ones = constant(node, names, "ones", np.ones(groups, dtype))
    zeros = constant(node, names, "zeros", np.zeros(groups, dtype))
    axes = constant(node, names, "axes", np.arange(1, len(x.shape) - 1, dtype=np.int64))
    shape = ir.node("Shape", [x])
    grouped = ir.node("Reshape", [x, grouped_shape])
    normalized = ir.node(
        "InstanceNormalization",
        [grouped.outputs[0], ones, zeros],
        {"epsilon": pop(node, "epsilon", 1e-5)},
    )
    restored = ir.node("Reshape", [normalized.outputs[0], shape.outputs[0]])
    channel_scale = ir.node("Unsqueeze", [scale, axes])
    channel_bias = ir.node("Unsqueeze", [bias, axes])
    scaled = ir.node("Mul", [restored.outputs[0], channel_scale.outputs[0]])
    shifted = ir.node("Add", [scaled.outputs[0], channel_bias.outputs[0]], name=node.name)
    replace(node, names, [shape, grouped, normalized, restored, channel_scale, channel_bias, scaled, shifted])


DOWNGRADES: Final[Mapping[tuple[str, int], Adapter]] = {
    ("AveragePool", 19): _average_pool_dilations,
    ("Cast", 19): drop("saturate"),
    ("Cast", 24): drop("round_mode"),
    ("CastLike", 19): drop("saturate"),
    ("CastLike", 24): drop("round_mode"),
    ("DequantizeLinear", 21): _output_dtype,
    ("Gelu", 20): _gelu,
    ("GridSample", 20): _grid_sample_mode,
    ("GroupNormalization", 21): _group_normalization,
    ("Pad", 19): refuse_value("mode", "wrap"),
    ("QuantizeLinear", 19): drop("saturate"),
    ("QuantizeLinear", 21): _output_dtype,
    ("RMSNormalization", 23): _rms_normalization,
    ("Range", 27): drop("stash_type"),
    ("Resize", 19): refuse_value("coordinate_transformation_mode", "half_pixel_symmetric"),
    ("SpaceToDepth", 28): drop_default(mode="DCR"),
    ("Swish", 24): _swish,
}
