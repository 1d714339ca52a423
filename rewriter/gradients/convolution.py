"""Gradient rules of Conv and ConvTranspose, in one to three spatial dimensions.

com.microsoft.ConvGrad does the work. Its limits, and what is done about them: on the CPU, groups in one
and three dimensions overrun the gradient buffer (1-D is computed as 2-D, 3-D group by group); on CUDA the
padding must be symmetric (the input is padded before, its gradient cropped after).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.gradients.context import Context, rank_of
from rewriter.gradients.registry import Gradients, rule

_TO_THE_END = 2**63 - 1


def _unsupported(node: ir.Node) -> str | None:
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto_pad must be written as explicit pads"
    if "output_shape" in node.attributes:
        return "output_shape must be written as explicit pads"
    if _spatial_rank(node) is None:
        return "the rank of its weight is not known"
    return None


def _spatial_rank(node: ir.Node) -> int | None:
    kernel = node.attributes.get("kernel_shape")
    if kernel is not None:
        return len(kernel.as_ints())
    ranks = [rank for value in node.inputs[:2] if (rank := rank_of(value)) is not None]
    return ranks[0] - 2 if ranks else None


@rule("Conv", inputs=None, obstacle=_unsupported)
def conv(ctx: Context, dy: ir.Value) -> Gradients:
    dx, dw = _conv_gradients(ctx, dy, ctx.input(0), ctx.input(1), want_dx=ctx.needs(0))
    return dx if ctx.needs(0) else None, dw if ctx.needs(1) else None, _bias_gradient(ctx, dy)


@rule("ConvTranspose", inputs=None, obstacle=_unsupported)
def conv_transpose(ctx: Context, dy: ir.Value) -> Gradients:
    """ConvTranspose is the input gradient of the Conv with the same weight and attributes.

    So dX = Conv(dY, W), and dW is that Conv's weight gradient with dY as its input and X as its output
    gradient.
    """
    x, w = ctx.input(0), ctx.input(1)
    dx = dw = None
    if ctx.needs(0):
        dx = ctx.op("Conv", dy, w, **_attributes(ctx.node))
    if ctx.needs(1):
        _, dw = _conv_gradients(ctx, x, dy, w, want_dx=False)
    return dx, dw, _bias_gradient(ctx, dy)


def _bias_gradient(ctx: Context, dy: ir.Value) -> ir.Value | None:
    """dY summed over all but the channels."""
    if not ctx.needs(2):
        return None
    rank = _spatial_rank(ctx.node) or 0
    return ctx.op("ReduceSum", dy, ctx.ints(0, *range(2, rank + 2)), keepdims=0)


def _conv_gradients(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, *, want_dx: bool
) -> tuple[ir.Value | None, ir.Value | None]:
    """dX (None unless wanted) and dW of the Conv of `ctx.node`'s attributes."""
    if not want_dx and not ctx.needs(1):
        return None, None
    attributes = _attributes(ctx.node)
    rank, group = _spatial_rank(ctx.node) or 0, ctx.node.attributes.get_int("group", 1)
    pads = list(ctx.node.attributes.get_ints("pads", [0] * (2 * rank)))
    begin, end = pads[:rank], pads[rank:]
    crop = begin != end
    if crop:
        x = ctx.op("Pad", x, ctx.ints(0, 0, *begin, 0, 0, *end))
        attributes["pads"] = [0] * (2 * rank)

    if group > 1 and rank == 1:
        dx, dw = _as_two_dimensional(ctx, dy, x, w, attributes, want_dx)
    elif group > 1 and rank > 2:
        dx, dw = _group_by_group(ctx, dy, x, w, attributes, want_dx)
    else:
        dx, dw = _conv_grad(ctx, dy, x, w, attributes, want_dx)

    if crop and dx is not None:
        ends = [-p if p else _TO_THE_END for p in end]
        dx = ctx.op("Slice", dx, ctx.ints(*begin), ctx.ints(*ends), ctx.ints(*range(2, rank + 2)))
    return dx, dw


def _conv_grad(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, attributes: dict[str, Any], want_dx: bool
) -> tuple[ir.Value | None, ir.Value]:
    dx, dw = ctx.ops("ConvGrad", dy, x, w, domain="com.microsoft", outputs=(want_dx, True), **attributes)
    return dx if want_dx else None, dw


def _as_two_dimensional(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, attributes: dict[str, Any], want_dx: bool
) -> tuple[ir.Value | None, ir.Value]:
    """A 1-D convolution is a 2-D one of height 1."""
    height = ctx.ints(2)
    neutral = {"kernel_shape": 1, "strides": 1, "dilations": 1, "pads": 0}
    for name, value in neutral.items():
        sizes = attributes.get(name)
        if isinstance(sizes, list):
            half = len(sizes) // 2 if name == "pads" else len(sizes)
            attributes[name] = [value, *sizes[:half], *([value, *sizes[half:]] if name == "pads" else [])]
    lifted = [ctx.op("Unsqueeze", value, height) for value in (dy, x, w)]
    dx, dw = _conv_grad(ctx, lifted[0], lifted[1], lifted[2], attributes, want_dx)
    return None if dx is None else ctx.op("Squeeze", dx, height), ctx.op("Squeeze", dw, height)


def _group_by_group(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, attributes: dict[str, Any], want_dx: bool
) -> tuple[ir.Value | None, ir.Value]:
    group = ctx.node.attributes.get_int("group", 1)
    attributes["group"] = 1
    every = (True,) * group
    dys = ctx.ops("Split", dy, outputs=every, axis=1, num_outputs=group)
    xs = ctx.ops("Split", x, outputs=every, axis=1, num_outputs=group)
    ws = ctx.ops("Split", w, outputs=every, axis=0, num_outputs=group)
    parts = [_conv_grad(ctx, *one, attributes, want_dx) for one in zip(dys, xs, ws, strict=True)]
    dx = ctx.op("Concat", *(part[0] for part in parts), axis=1) if want_dx else None
    return dx, ctx.op("Concat", *(part[1] for part in parts), axis=0)


def _attributes(node: ir.Node) -> dict[str, Any]:
    """The attributes of the convolution with the same geometry."""
    attributes = node.attributes
    result: dict[str, Any] = {"group": attributes.get_int("group", 1)}
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        if name in attributes:
            result[name] = list(attributes[name].as_ints())
    return result
