"""What the rewriter knows about ONNX operators: one table, operator type -> traits.

Placement, batch-norm folding and finalization read it; what a runtime does with an operator is in
`rewriter.targets`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final, Literal

import onnx_ir as ir

from rewriter.fake_quantize import is_fake_quantize, is_fake_quantize_bias
from rewriter.initializers import constant_array

MICROSOFT: Final = "com.microsoft"  # the domain of onnxruntime's own operators

Kind = Literal["layer", "arithmetic", "pooling", "movement", "pointwise", "reduction"]

# Of a node and its weight, an input of it: the output-channel axis, or None and the reason.
OutputAxis = Callable[[ir.Node, int, ir.Value], tuple[int | None, str]]


@dataclasses.dataclass(frozen=True)
class Traits:
    """How to read a node of one operator type.

    Attributes:
        kind: "layer": a weighted sum (a convolution or matrix product); "arithmetic": Add, Mul, ... of two
            tensors; "pooling": averages; "movement": every output element is an input element, so that the
            output lies on the quantization grid of the input; "pointwise": a function of each element;
            "reduction": statistics over axes.
        data: position of the (first) activation input.
        data_inputs: how many inputs, from `data` on, carry activations; None: all of them.
        weight: position of the weight; a MatMul's may be on either side, see `weight_operand`.
        bias: position of the optional bias.
        output_axis: for "layer": output-channel axis of the weight at an input, or None and the reason.
        only_moves: for "movement": whether this node really only moves data.
    """

    kind: Kind
    data: int = 0
    data_inputs: int | None = 1
    weight: int | None = None
    bias: int | None = None
    output_axis: OutputAxis = lambda node, index, weight: (None, "it has no weight")
    only_moves: Callable[[ir.Node], bool] = lambda node: True


def traits_of(node: ir.Node) -> Traits | None:
    """Traits of a node of the standard operator set, None when the table does not have its type."""
    return OPERATORS.get(node.op_type) if node.domain == "" else None


def is_operator(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these standard operators."""
    return node is not None and node.op_type in op_types and node.domain == ""


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer that no caller can replace."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def unquantized(value: ir.Value) -> ir.Value:
    """The value itself, or what stands before the quantizer that makes it."""
    producer = value.producer()
    if producer is None or not (is_fake_quantize(producer) or is_fake_quantize_bias(producer)):
        return value
    float_value = producer.inputs[0]
    assert float_value is not None
    return float_value


@dataclasses.dataclass(frozen=True)
class WeightOperand:
    """The constant weight of a layer.

    Attributes:
        index: which input of the node it is.
        value: the initializer (behind its FakeQuantize, if it has one).
        axis: output-channel axis of the weight, None where one scale per channel cannot be said with one
            axis (`why_no_axis` tells why).
    """

    index: int
    value: ir.Value
    axis: int | None
    why_no_axis: str = ""


def weight_operand(node: ir.Node) -> WeightOperand | None:
    """The constant weight of a layer; None when there is none (two activations, or not a layer)."""
    traits = traits_of(node)
    if traits is None or traits.weight is None:
        return None
    # A MatMul of two constants has its weight on the usual side.
    for index in (1, 0) if node.op_type == "MatMul" else (traits.weight,):
        operand = node.inputs[index] if index < len(node.inputs) else None
        if operand is not None and is_constant(value := unquantized(operand)):
            return WeightOperand(index, value, *traits.output_axis(node, index, value))
    return None


def movement_inputs(node: ir.Node, traits: Traits) -> list[ir.Value]:
    """The activation inputs of a movement operator."""
    end = len(node.inputs) if traits.data_inputs is None else traits.data + traits.data_inputs
    return [value for value in node.inputs[traits.data : end] if value is not None]


def _has_only_first_output(node: ir.Node) -> bool:
    return all(not output.uses() and not output.is_graph_output() for output in node.outputs[1:])


def _is_nearest(node: ir.Node) -> bool:
    # Outside the input, tf_crop_and_resize writes extrapolation_value.
    return (
        node.attributes.get_string("mode", "nearest") == "nearest"
        and node.attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    )


def _pads_with_grid_values(node: ir.Node) -> bool:
    """Whether Pad writes zeros (on every grid) or copies."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True
    constant = constant_array(value)
    return constant is not None and bool((constant == 0).all())


def _conv_axis(node: ir.Node, index: int, weight: ir.Value) -> tuple[int | None, str]:
    return 0, ""  # [C_out, C_in / group, ...]


def _conv_transpose_axis(node: ir.Node, index: int, weight: ir.Value) -> tuple[int | None, str]:
    # [C_in, C_out / group, ...]: the channels of all groups lie along two axes.
    if node.attributes.get_int("group", 1) != 1:
        return None, "a grouped transposed convolution has no single output-channel axis"
    return 1, ""


def _gemm_axis(node: ir.Node, index: int, weight: ir.Value) -> tuple[int | None, str]:
    return (0 if node.attributes.get_int("transB", 0) else 1), ""


def _matmul_axis(node: ir.Node, index: int, weight: ir.Value) -> tuple[int | None, str]:
    # [K, N] on the right, [M, K] on the left.
    rank = None if weight.shape is None else len(weight.shape)
    if rank == 2:
        return index, ""
    # onnxruntime's QLinearMatMul fails on a 1-D scale of a batched weight.
    return None, f"a matrix product with a weight of rank {rank} takes one scale only"


_LAYERS: Final = {
    "Conv": Traits("layer", weight=1, bias=2, output_axis=_conv_axis),
    "ConvTranspose": Traits("layer", weight=1, bias=2, output_axis=_conv_transpose_axis),
    "Gemm": Traits("layer", weight=1, bias=2, output_axis=_gemm_axis),
    "MatMul": Traits("layer", weight=1, output_axis=_matmul_axis),
}

_MOVEMENT: Final = {
    "Concat": Traits("movement", data_inputs=None),
    "DepthToSpace": Traits("movement"),
    "Expand": Traits("movement"),
    "Flatten": Traits("movement"),
    "Gather": Traits("movement"),
    "Identity": Traits("movement"),
    "MaxPool": Traits("movement", only_moves=_has_only_first_output),
    "Pad": Traits("movement", only_moves=_pads_with_grid_values),
    "Reshape": Traits("movement"),
    "Resize": Traits("movement", only_moves=_is_nearest),
    "Slice": Traits("movement"),
    "SpaceToDepth": Traits("movement"),
    "Split": Traits("movement"),
    "Squeeze": Traits("movement"),
    "Tile": Traits("movement"),
    "Transpose": Traits("movement"),
    "Unsqueeze": Traits("movement"),
}

OPERATORS: Final[Mapping[str, Traits]] = {
    **_LAYERS,
    **_MOVEMENT,
    **{op: Traits("arithmetic", data_inputs=2) for op in ("Add", "Div", "Mul", "Pow", "Sub")},
    **{op: Traits("pooling") for op in ("AveragePool", "GlobalAveragePool")},
    **{
        op: Traits("pointwise")
        for op in (
            "Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu",
            "Log", "Max", "Min", "Mish", "Neg", "PRelu", "Reciprocal", "Relu", "Selu", "Sigmoid",
            "Softplus", "Softsign", "Sqrt", "Tanh",
        )
    },
    **{
        op: Traits("reduction")
        for op in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare")
    },
}  # fmt: skip
