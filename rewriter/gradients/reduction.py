"""Gradient rules of the reductions; axes as an input (opset 18) or as an attribute, constant or not."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.gradients.context import Context, rank_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.initializers import constant_array


@rule("ReduceSum", any_float=True)
def reduce_sum(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.expand_like(_with_reduced_axes(ctx, dy), ctx.input(0))]


@rule("ReduceMean", any_float=True)
def reduce_mean(ctx: Context, dy: ir.Value) -> Gradients:
    share = ctx.div(dy, _reduced_elements(ctx, dy))
    return [ctx.expand_like(_with_reduced_axes(ctx, share), ctx.input(0))]


@rule("ReduceSumSquare", any_float=True)
def reduce_sum_square(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.mul(ctx.times(ctx.input(0), 2.0), _with_reduced_axes(ctx, dy))]


@rule("ReduceL1", any_float=True)
def reduce_l1(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.mul(ctx.op("Sign", ctx.input(0)), _with_reduced_axes(ctx, dy))]


@rule("ReduceL2", any_float=True)
def reduce_l2(ctx: Context, dy: ir.Value) -> Gradients:
    """dy * x / y; zero where the norm is zero."""
    y, zero = ctx.output(), ctx.scalar(0, dy)
    share = ctx.op("Where", ctx.op("Equal", y, zero), zero, ctx.div(dy, y))
    return [ctx.mul(ctx.input(0), _with_reduced_axes(ctx, share))]


@rule("ReduceLogSumExp", any_float=True)
def reduce_log_sum_exp(ctx: Context, dy: ir.Value) -> Gradients:
    """dy * softmax(x)."""
    probability = ctx.op("Exp", ctx.sub(ctx.input(0), _with_reduced_axes(ctx, ctx.output())))
    return [ctx.mul(probability, _with_reduced_axes(ctx, dy))]


@rule("ReduceMax", "ReduceMin", any_float=True)
def reduce_extremum(ctx: Context, dy: ir.Value) -> Gradients:
    """To the elements that were taken; elements that tie share evenly."""
    x = ctx.input(0)
    mask = ctx.as_float(ctx.op("Equal", x, _with_reduced_axes(ctx, ctx.output())), x)
    noop = ctx.node.attributes.get_int("noop_with_empty_axes", 0)
    ties = ctx.op("ReduceSum", mask, _axes(ctx), keepdims=1, noop_with_empty_axes=noop)
    return [ctx.mul(mask, ctx.div(_with_reduced_axes(ctx, dy), ties))]


def _with_reduced_axes(ctx: Context, value: ir.Value) -> ir.Value:
    """A tensor of the output's shape with the reduced axes as 1, so that it broadcasts to the input."""
    axes = _axes(ctx)
    if ctx.node.attributes.get_int("keepdims", 1) or axes is None:
        return value  # without axes: either nothing was reduced, or a scalar is left
    return ctx.op("Unsqueeze", value, axes)


def _reduced_elements(ctx: Context, dy: ir.Value) -> ir.Value:
    """How many elements of the input go into one of the output; a scalar."""
    x, axes = ctx.input(0), _axes(ctx)
    rank, known = rank_of(x), None if axes is None else constant_array(axes)
    if rank is None or (axes is not None and known is None):
        count = ctx.div(ctx.op("Size", x), ctx.op("Size", dy))
        return ctx.product(ctx.op("Reshape", count, ctx.ints(-1)), dy)
    reduced = [] if known is None else [int(axis) for axis in known]
    if not reduced and not ctx.node.attributes.get_int("noop_with_empty_axes", 0):
        reduced = list(range(rank))
    return ctx.elements(x, reduced, dy)


def _axes(ctx: Context) -> ir.Value | None:
    attribute = ctx.node.attributes.get("axes")
    return ctx.optional(1) if attribute is None else ctx.ints(*attribute.as_ints())
