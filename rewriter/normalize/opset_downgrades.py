"""What changed in ONNX operators after opset 18, and how a node of a newer opset is written in 18.

Adapters as in `opset_upgrades`. Attributes at their default are dropped; an attribute that says something
opset 18 cannot express stays, and the check of the pass then names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.normalize.initializers import add_initializer, owning_graph
from rewriter.normalize.opset_upgrades import pop, replace, set_input, unsupported

Adapter = Callable[[ir.Node], ir.Node | None]


def _drop_default(**defaults: int | str) -> Adapter:
    """Attributes that are new: dropped where they have the value that opset 18 implies."""

    def adapter(node: ir.Node) -> ir.Node:
        for name, default in defaults.items():
            if name in node.attributes and node.attributes[name].value == default:
                node.attributes.pop(name)
        return node

    return adapter


def _drop(*names: str) -> Adapter:
    """Attributes that only matter for element types that opset 18 does not have."""

    def adapter(node: ir.Node) -> ir.Node:
        for name in names:
            node.attributes.pop(name, None)
        return node

    return adapter


def _refuse_value(name: str, value: str) -> Adapter:
    def adapter(node: ir.Node) -> ir.Node:
        if name in node.attributes and node.attributes[name].value == value:
            raise unsupported(node, f"{name} = {value!r} is newer")
        return node

    return adapter


def _average_pool_dilations(node: ir.Node) -> ir.Node:
    if "dilations" in node.attributes and set(node.attributes["dilations"].value) <= {1}:
        node.attributes.pop("dilations")
    return node


def _output_dtype(node: ir.Node) -> ir.Node:
    """Opset 21/23: the type can be an attribute; in 18 the zero point (Q) or the scale (DQ) says it."""
    _drop_default(block_size=0, output_dtype=0, precision=0)(node)
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
        set_input(node, 2, np.zeros(scale.shape.numpy(), dtype.numpy()), "zero_point")
    return node


def _grid_sample_mode(node: ir.Node) -> ir.Node:
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4:
        raise unsupported(node, "only images (4-D) are defined in opset 18")
    mode = pop(node, "mode", "linear")
    node.attributes["mode"] = ir.AttrString(
        "mode", {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    )
    return node


def _scalar(node: ir.Node, what: str, value: float) -> ir.Value:
    x = node.inputs[0]
    dtype = np.dtype(np.float32) if x is None or x.dtype is None else x.dtype.numpy()
    return add_initializer(owning_graph(node), f"{node.outputs[0].name}_{what}", np.asarray(value, dtype))


def _gelu(node: ir.Node) -> None:
    """y = x * (0.5 * (1 + erf(x / sqrt 2))), or the tanh approximation; ONNX operator Gelu."""
    x = node.inputs[0]
    half, one = _scalar(node, "half", 0.5), _scalar(node, "one", 1.0)
    if pop(node, "approximate", "none") == "none":
        inner = [ir.node("Div", [x, _scalar(node, "sqrt_2", math.sqrt(2))])]
        inner.append(ir.node("Erf", [inner[-1].outputs[0]]))
    else:
        three, cubic = _scalar(node, "three", 3.0), _scalar(node, "cubic", 0.044715)
        inner = [ir.node("Pow", [x, three])]
        inner.append(ir.node("Mul", [inner[-1].outputs[0], cubic]))
        inner.append(ir.node("Add", [x, inner[-1].outputs[0]]))
        root = _scalar(node, "sqrt_2_over_pi", math.sqrt(2 / math.pi))
        inner.append(ir.node("Mul", [inner[-1].outputs[0], root]))
        inner.append(ir.node("Tanh", [inner[-1].outputs[0]]))
    plus_one = ir.node("Add", [inner[-1].outputs[0], one])
    halved = ir.node("Mul", [plus_one.outputs[0], half])
    product = ir.node("Mul", [x, halved.outputs[0]], name=node.name)
    replace(owning_graph(node), node, [*inner, plus_one, halved, product])


def _swish(node: ir.Node) -> None:
    """y = x * sigmoid(alpha * x)."""
    x = node.inputs[0]
    alpha = pop(node, "alpha", 1.0)
    nodes = [] if alpha == 1.0 else [ir.node("Mul", [x, _scalar(node, "alpha", alpha)])]
    nodes.append(ir.node("Sigmoid", [nodes[-1].outputs[0] if nodes else x]))
    product = ir.node("Mul", [x, nodes[-1].outputs[0]], name=node.name)
    replace(owning_graph(node), node, [*nodes, product])


def _rms_normalization(node: ir.Node) -> None:
    """y = x / sqrt(mean(x^2) + epsilon) * scale, the mean over the dimensions from `axis` on."""
    x, scale = node.inputs[:2]
    axis = pop(node, "axis", -1)
    rank = None if x is None or x.shape is None else len(x.shape)
    if axis != -1 and rank is None:
        raise unsupported(node, "the rank of its input is not known")
    first = axis if axis < 0 else axis - (rank or 0)
    graph = owning_graph(node)
    axes = add_initializer(graph, f"{node.outputs[0].name}_axes", np.arange(first, 0, dtype=np.int64))
    square = ir.node("Mul", [x, x])
    mean = ir.node("ReduceMean", [square.outputs[0], axes], {"keepdims": 1})
    epsilon = _scalar(node, "epsilon", pop(node, "epsilon", 1e-5))
    shifted = ir.node("Add", [mean.outputs[0], epsilon])
    root = ir.node("Sqrt", [shifted.outputs[0]])
    normalized = ir.node("Div", [x, root.outputs[0]])
    scaled = ir.node("Mul", [normalized.outputs[0], scale], name=node.name)
    replace(graph, node, [square, mean, shifted, root, normalized, scaled])


def _group_normalization(node: ir.Node) -> None:
    """Each group normalized as one instance, then scale and bias per channel."""
    x, scale, bias = node.inputs
    if x is None or x.shape is None:
        raise unsupported(node, "the rank of its input is not known")
    graph, name = owning_graph(node), node.outputs[0].name
    groups = pop(node, "num_groups")
    dtype = np.dtype(np.float32) if x.dtype is None else x.dtype.numpy()
    grouped_shape = add_initializer(graph, f"{name}_grouped", np.array([0, groups, -1], np.int64))
    ones = add_initializer(graph, f"{name}_ones", np.ones(groups, dtype))
    zeros = add_initializer(graph, f"{name}_zeros", np.zeros(groups, dtype))
    axes = add_initializer(graph, f"{name}_axes", np.arange(1, len(x.shape) - 1, dtype=np.int64))
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
    replace(graph, node, [shape, grouped, normalized, restored, channel_scale, channel_bias, scaled, shifted])


DOWNGRADES: Final[Mapping[tuple[str, int], Adapter]] = {
    ("AveragePool", 19): _average_pool_dilations,
    ("Cast", 19): _drop("saturate"),
    ("Cast", 24): _drop("round_mode"),
    ("CastLike", 19): _drop("saturate"),
    ("CastLike", 24): _drop("round_mode"),
    ("DequantizeLinear", 21): _output_dtype,
    ("Gelu", 20): _gelu,
    ("GridSample", 20): _grid_sample_mode,
    ("GroupNormalization", 21): _group_normalization,
    ("Pad", 19): _refuse_value("mode", "wrap"),
    ("QuantizeLinear", 19): _drop("saturate"),
    ("QuantizeLinear", 21): _output_dtype,
    ("RMSNormalization", 23): _rms_normalization,
    ("Range", 27): _drop("stash_type"),
    ("Resize", 19): _refuse_value("coordinate_transformation_mode", "half_pixel_symmetric"),
    ("SpaceToDepth", 28): _drop_default(mode="DCR"),
    ("Swish", 24): _swish,
}
