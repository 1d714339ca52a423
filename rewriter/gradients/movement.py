"""Gradient rules of the operators that move, repeat or select elements."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.gradients.context import Context, dims_of, rank_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.initializers import constant_array


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze", any_float=True)
def reshape(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.reshape_like(dy, ctx.input(0))]


@rule("Transpose", any_float=True)
def transpose(ctx: Context, dy: ir.Value) -> Gradients:
    perm = ctx.node.attributes.get("perm")
    if perm is None:  # reverses the axes, and so does the way back
        return [ctx.op("Transpose", dy)]
    order = list(perm.as_ints())
    return [ctx.op("Transpose", dy, perm=[order.index(axis) for axis in range(len(order))])]


@rule("Concat", inputs=None, any_float=True)
def concat(ctx: Context, dy: ir.Value) -> Gradients:
    axis = ctx.node.attributes["axis"].as_int()
    sizes = [ctx.dimension(ctx.input(i), axis) for i in range(len(ctx.needed))]
    if len(sizes) == 1:
        return [dy]
    known = [array for size in sizes if (array := constant_array(size)) is not None]
    if len(known) == len(sizes):
        split = ctx.ints(*(int(array[0]) for array in known))
    else:
        split = ctx.op("Concat", *sizes, axis=0)
    return ctx.ops("Split", dy, split, outputs=(True,) * len(sizes), axis=axis)


@rule("Split", outputs=None, any_float=True)
def split(ctx: Context, *dys: ir.Value | None) -> Gradients:
    """Concat; an output that the loss does not depend on counts zeros."""
    outputs = ctx.node.outputs
    parts = [ctx.zeros_like(output) if dy is None else dy for dy, output in zip(dys, outputs, strict=True)]
    return [ctx.op("Concat", *parts, axis=ctx.node.attributes.get_int("axis", 0))]


@rule("Slice")
def slice_(ctx: Context, dy: ir.Value) -> Gradients:
    x, (starts, ends, axes, steps) = ctx.input(0), (ctx.optional(i) for i in range(1, 5))
    sizes = constant_array(steps)
    if steps is None or (sizes is not None and bool(np.greater(sizes.astype(np.int64), 0).all())):
        return [ctx.ms("SliceGrad", dy, ctx.shape(x), starts, ends, axes, steps)]
    # SliceGrad fails on most negative steps. The same slice of the elements' positions says where to add.
    shape, flat = ctx.shape(x), ctx.ints(-1)
    size = ctx.op("Size", x)
    positions = ctx.op("Range", ctx.array(np.array(0)), size, ctx.array(np.array(1)))
    grid = ctx.op("Reshape", positions, shape, allowzero=1)
    taken = ctx.op("Reshape", ctx.op("Slice", grid, starts, ends, axes, steps), flat)
    total = ctx.op("Reshape", size, flat)
    dx = ctx.ms("GatherElementsGrad", ctx.op("Reshape", dy, flat), total, taken, axis=0)
    return [ctx.reshape_like(dx, x)]


@rule("Gather")
def gather(ctx: Context, dy: ir.Value) -> Gradients:
    axis = ctx.node.attributes.get_int("axis", 0)
    return [ctx.ms("GatherGrad", ctx.shape(ctx.input(0)), ctx.input(1), dy, axis=axis)]


@rule("GatherElements")
def gather_elements(ctx: Context, dy: ir.Value) -> Gradients:
    axis = ctx.node.attributes.get_int("axis", 0)
    return [ctx.ms("GatherElementsGrad", dy, ctx.shape(ctx.input(0)), ctx.input(1), axis=axis)]


@rule("Expand", any_float=True)
def expand(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.sum_to(dy, ctx.input(0), dims_of(ctx.output()))]


def _unknown_rank(node: ir.Node) -> str | None:
    return "the rank of its input is not known" if rank_of(node.inputs[0]) is None else None


@rule("Tile", any_float=True, obstacle=_unknown_rank)
def tile(ctx: Context, dy: ir.Value) -> Gradients:
    """Splits every axis in (repeats, size) and sums the repeats."""
    x = ctx.input(0)
    rank = rank_of(x) or 0
    column = ctx.ints(1)
    pairs = ctx.op(
        "Concat",
        ctx.op("Unsqueeze", ctx.input(1), column),
        ctx.op("Unsqueeze", ctx.shape(x), column),
        axis=1,
    )
    repeated = ctx.op("Reshape", dy, ctx.op("Reshape", pairs, ctx.ints(-1)))
    return [ctx.op("ReduceSum", repeated, ctx.ints(*range(0, 2 * rank, 2)), keepdims=0)]


def _not_constant(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "constant")
    return None if mode == "constant" else f"there is no gradient rule for its mode {mode!r}"


@rule("Pad", obstacle=_not_constant)
def pad(ctx: Context, dy: ir.Value) -> Gradients:
    """Padding by the negative amounts: crops what was added, and puts zeros where elements were cut."""
    axes = ctx.optional(3)
    return [ctx.op("Pad", dy, ctx.neg(ctx.input(1)), *([] if axes is None else [None, axes]))]


@rule("DepthToSpace", any_float=True)
def depth_to_space(ctx: Context, dy: ir.Value) -> Gradients:
    """[N, C, H b, W b] back to [N, C b b, H, W]; the mode says which part of the channel the block is."""
    block = ctx.node.attributes["blocksize"].as_int()
    if ctx.node.attributes.get_string("mode", "DCR") == "DCR":
        return [ctx.op("SpaceToDepth", dy, blocksize=block)]
    x = ctx.input(0)
    inner = ctx.op("Concat", ctx.ints(0, -1), ctx.dimension(x, 2), ctx.ints(block), axis=0)
    shape = ctx.op("Concat", inner, ctx.dimension(x, 3), ctx.ints(block), axis=0)
    blocks = ctx.op("Transpose", ctx.op("Reshape", dy, shape), perm=[0, 1, 3, 5, 2, 4])
    return [ctx.reshape_like(blocks, x)]


@rule("SpaceToDepth", any_float=True)
def space_to_depth(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.op("DepthToSpace", dy, blocksize=ctx.node.attributes["blocksize"].as_int(), mode="DCR")]
