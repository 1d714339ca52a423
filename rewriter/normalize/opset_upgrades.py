"""What changed in ONNX operators up to opset 18, and how a node of an older opset is written today.

`UPGRADES` at the end says which change came with which opset; `normalize.adapters` what an adapter is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.names import FreeNames
from rewriter.normalize.adapters import (
    Adapter,
    constant,
    drop,
    in_turn,
    input_type,
    insert_before,
    ints_to_input,
    pop,
    refuse,
    replace,
    set_input,
    unsupported,
    write_default,
)


def _broadcast_from_axis(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 7: NumPy broadcasting instead of `broadcast` from `axis` on."""
    broadcast, axis = pop(node, "broadcast", 0), pop(node, "axis")
    if not broadcast or axis is None:
        return node
    a, b = node.inputs
    assert a is not None
    assert b is not None
    if a.shape is None or b.shape is None:
        raise unsupported(node, "it broadcasts along an axis, and the rank of its inputs is not known")
    missing = len(a.shape) - axis % max(len(a.shape), 1) - len(b.shape)
    if missing > 0:
        _append_axes(node, names, 1, missing)
    return node


def _append_axes(node: ir.Node, names: FreeNames, index: int, count: int) -> None:
    """Give input `index` (of known rank) `count` more dimensions of 1 at its end."""
    value = node.inputs[index]
    assert value is not None
    assert value.shape is not None
    rank = len(value.shape)
    axes = np.arange(rank, rank + count, dtype=np.int64)
    unsqueeze = ir.node("Unsqueeze", [value, constant(node, names, "axes", axes)])
    unsqueeze.outputs[0].shape = ir.Shape([*value.shape, *[1] * count])
    unsqueeze.outputs[0].type = value.type
    node.replace_input_with(index, insert_before(node, names, unsqueeze))


def _prelu_channel_slope(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 7: NumPy broadcasting of the slope instead of one slope per channel."""
    x, slope = node.inputs
    assert x is not None
    assert slope is not None
    if slope.shape is None or x.shape is None:
        raise unsupported(node, "the rank of its inputs is not known")
    if len(slope.shape) == 1 and slope.shape[0] != 1 and len(x.shape) > 2:
        _append_axes(node, names, 1, len(x.shape) - 2)
    return node


def _cast_to_number(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 6: the element type as a number instead of its name."""
    name = pop(node, "to")
    try:
        dtype = ir.DataType[str(name).upper()]
    except KeyError as error:
        raise unsupported(node, f"there is no element type {name!r}") from error
    node.attributes["to"] = ir.AttrInt64("to", dtype.value)
    return node


def _integer_p(node: ir.Node, names: FreeNames) -> ir.Node:
    p = pop(node, "p", 2.0)
    if p != int(p):
        raise unsupported(node, f"its p = {p} is not an integer")
    node.attributes["p"] = ir.AttrInt64("p", int(p))
    return node


def _batch_normalization_spatial(node: ir.Node, names: FreeNames) -> ir.Node:
    if pop(node, "spatial", 1) != 1:
        raise unsupported(node, "spatial = 0 is not defined in newer opsets")
    return node


def _batch_normalization_outputs(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 14: training is an attribute; a node with more outputs was in training mode before."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise unsupported(node, "its batch statistics are used; export the model for inference")
    node.resize_outputs(1)
    return node


def _clip_bounds(node: ir.Node, names: FreeNames) -> ir.Node:
    low, high = pop(node, "min"), pop(node, "max")
    if high is not None:
        set_input(node, names, 2, np.asarray(high, input_type(node)), "max")
    if low is not None:
        set_input(node, names, 1, np.asarray(low, input_type(node)), "min")
    return node


def _pad_paddings(node: ir.Node, names: FreeNames) -> ir.Node:
    node.attributes["pads"] = ir.AttrInt64s("pads", pop(node, "paddings", ()))
    return node


def _pad_inputs(node: ir.Node, names: FreeNames) -> ir.Node:
    pads, value = pop(node, "pads", ()), pop(node, "value", 0.0)
    set_input(node, names, 1, np.asarray(pads, np.int64), "pads")
    if value != 0.0:
        set_input(node, names, 2, np.asarray(value, input_type(node)), "value")
    return node


def _upsample_scales(node: ir.Node, names: FreeNames) -> ir.Node:
    height, width = pop(node, "height_scale"), pop(node, "width_scale")
    node.attributes["scales"] = ir.AttrFloat32s("scales", (1.0, 1.0, height, width))
    if pop(node, "mode", "nearest") in ("linear", "bilinear"):
        node.attributes["mode"] = ir.AttrString("mode", "linear")
    return node


def _upsample_scales_input(node: ir.Node, names: FreeNames) -> ir.Node:
    set_input(node, names, 1, np.asarray(pop(node, "scales"), np.float32), "scales")
    return node


def _upsample_to_resize(node: ir.Node, names: FreeNames) -> ir.Node:
    node.op_type = "Resize"
    return node


def _resize_modes(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 11: the coordinate transformation is chosen; up to 10 it is asymmetric, rounding down."""
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    node.attributes["coordinate_transformation_mode"] = ir.AttrString(
        "coordinate_transformation_mode", "asymmetric"
    )
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    return node


def _resize_scales_or_sizes(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 13: what is not given is left out instead of being empty."""
    for index in (1, 2):
        given = constant_array(node.inputs[index]) if index < len(node.inputs) else None
        if given is not None and given.size == 0:
            node.replace_input_with(index, None)
    return node


def _slice_inputs(node: ir.Node, names: FreeNames) -> ir.Node:
    starts, ends, axes = pop(node, "starts", ()), pop(node, "ends", ()), pop(node, "axes")
    set_input(node, names, 1, np.asarray(starts, np.int64), "starts")
    set_input(node, names, 2, np.asarray(ends, np.int64), "ends")
    if axes is not None:
        set_input(node, names, 3, np.asarray(axes, np.int64), "axes")
    return node


def _top_k_input(node: ir.Node, names: FreeNames) -> ir.Node:
    set_input(node, names, 1, np.asarray([pop(node, "k")], np.int64), "k")
    return node


def _split_num_outputs(node: ir.Node, names: FreeNames) -> ir.Node:
    """Opset 18: equal parts have to be counted."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.resize_inputs(1)
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    return node


def _scatter_to_scatter_elements(node: ir.Node, names: FreeNames) -> ir.Node:
    node.op_type = "ScatterElements"
    return node


def _softmax_over_one_axis(node: ir.Node, names: FreeNames) -> ir.Node | None:
    """Opset 13: along `axis` only; up to 12 over all dimensions from `axis` on, together.

    The same where no dimension larger than 1 follows. Else the input is flattened first; Flatten also does
    what the old operator did with the rank.
    """
    x = node.inputs[0]
    assert x is not None
    axis = pop(node, "axis", 1)
    shape = x.shape if x.shape is not None else node.outputs[0].shape
    if shape is not None:
        position = axis + len(shape) if axis < 0 else axis
        if all(dim == 1 for dim in shape[position + 1 :]):
            node.attributes["axis"] = ir.AttrInt64("axis", position)
            return node
    elif axis == -1:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return node
    shape_node = ir.node("Shape", [x])
    flatten = ir.node("Flatten", [x], {"axis": axis})
    softmax = ir.node(node.op_type, [flatten.outputs[0]], {"axis": -1})
    reshape = ir.node("Reshape", [softmax.outputs[0], shape_node.outputs[0]], name=node.name)
    replace(node, names, [shape_node, flatten, softmax, reshape])
    return None


SOFTMAX_FAMILY: Final = ("Softmax", "LogSoftmax", "Hardmax")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")
# Up to opset 5 a hint for in-place computation, without a meaning of its own.
_CONSUMED_INPUTS = (
    *("Abs", "Add", "BatchNormalization", "Ceil", "Clip", "Div", "Dropout", "Elu", "Exp", "Floor"),
    *("HardSigmoid", "InstanceNormalization", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mul", "Neg"),
    *("PRelu", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sqrt", "Sub", "Sum", "Tanh"),
)
_REDUCTIONS_18 = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSumSquare"),
)


UPGRADES: Final[Mapping[tuple[str, int], Adapter]] = {
    **{(op, 6): drop("consumed_inputs") for op in _CONSUMED_INPUTS},
    **{(op, 7): _broadcast_from_axis for op in _ELEMENTWISE},
    **{(op, 18): ints_to_input("axes") for op in _REDUCTIONS_18},
    **{(op, 13): _softmax_over_one_axis for op in SOFTMAX_FAMILY},
    **{(op, 13): ints_to_input("axes") for op in ("Squeeze", "Unsqueeze", "ReduceSum")},
    **{(op, 7): drop("output_sequence") for op in ("RNN", "LSTM", "GRU")},
    ("BatchNormalization", 7): drop("is_test"),
    ("BatchNormalization", 9): _batch_normalization_spatial,
    ("BatchNormalization", 14): _batch_normalization_outputs,
    ("Cast", 6): _cast_to_number,
    ("Clip", 11): _clip_bounds,
    ("Concat", 4): write_default("axis", 1),
    ("Dropout", 7): drop("is_test"),
    ("Dropout", 12): drop("ratio"),
    ("Gemm", 7): drop("broadcast"),
    ("GlobalLpPool", 2): _integer_p,
    ("LpPool", 2): _integer_p,
    ("PRelu", 7): _prelu_channel_slope,
    ("Pad", 2): _pad_paddings,
    ("Pad", 11): _pad_inputs,
    ("Reshape", 5): in_turn(drop("consumed_inputs"), ints_to_input("shape")),
    ("Resize", 11): _resize_modes,
    ("Resize", 13): _resize_scales_or_sizes,
    ("RoiAlign", 16): write_default("coordinate_transformation_mode", "output_half_pixel"),
    ("Scan", 9): refuse("the operator had another meaning up to opset 8"),
    ("Scatter", 11): _scatter_to_scatter_elements,
    ("Selu", 6): in_turn(
        drop("consumed_inputs"), write_default("alpha", 1.6732), write_default("gamma", 1.0507)
    ),
    ("Slice", 10): _slice_inputs,
    ("Split", 13): ints_to_input("split"),
    ("Split", 18): _split_num_outputs,
    ("TopK", 10): _top_k_input,
    ("Upsample", 7): _upsample_scales,
    ("Upsample", 9): _upsample_scales_input,
    ("Upsample", 10): _upsample_to_resize,
}
