"""Gradient rules of the elementwise arithmetic operators, with broadcasting."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from rewriter.gradients.context import Context, dims_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.initializers import constant_array


@rule("Add", inputs=None, any_float=True)
def add(ctx: Context, dy: ir.Value) -> Gradients:
    return [_sum_to(ctx, dy, i) if ctx.needs(i) else None for i in range(2)]


@rule("Sub", inputs=None, any_float=True)
def sub(ctx: Context, dy: ir.Value) -> Gradients:
    da = _sum_to(ctx, dy, 0) if ctx.needs(0) else None
    db = ctx.neg(_sum_to(ctx, dy, 1)) if ctx.needs(1) else None
    return da, db


@rule("Mul", inputs=None, any_float=True)
def mul(ctx: Context, dy: ir.Value) -> Gradients:
    a, b = ctx.input(0), ctx.input(1)
    da = _sum_to(ctx, ctx.mul(dy, b), 0) if ctx.needs(0) else None
    db = _sum_to(ctx, ctx.mul(dy, a), 1) if ctx.needs(1) else None
    return da, db


@rule("Div", inputs=None, any_float=True)
def div(ctx: Context, dy: ir.Value) -> Gradients:
    """da = dy / b; db = -dy * a / b^2 = -da * y, both summed over the broadcast axes."""
    quotient = ctx.div(dy, ctx.input(1))
    da = _sum_to(ctx, quotient, 0) if ctx.needs(0) else None
    db = ctx.neg(_sum_to(ctx, ctx.mul(quotient, ctx.output()), 1)) if ctx.needs(1) else None
    return da, db


@rule("Sum", inputs=None, any_float=True)
def sum_(ctx: Context, dy: ir.Value) -> Gradients:
    return [_sum_to(ctx, dy, i) if needed else None for i, needed in enumerate(ctx.needed)]


@rule("Mean", inputs=None, any_float=True)
def mean(ctx: Context, dy: ir.Value) -> Gradients:
    share = ctx.times(dy, 1 / len(ctx.needed))
    return [_sum_to(ctx, share, i) if needed else None for i, needed in enumerate(ctx.needed)]


@rule("Max", "Min", inputs=None, any_float=True)
def extremum(ctx: Context, dy: ir.Value) -> Gradients:
    """The gradient goes to the operand that was taken; operands that tie share it evenly."""
    masks = [ctx.as_float(ctx.op("Equal", ctx.input(i), ctx.output()), dy) for i in range(len(ctx.needed))]
    share = dy
    if len(masks) > 1:
        share = ctx.div(dy, ctx.op("Sum", *masks))
    return [_sum_to(ctx, ctx.mul(share, mask), i) if ctx.needs(i) else None for i, mask in enumerate(masks)]


@rule("Where", inputs=(1, 2), any_float=True)
def where(ctx: Context, dy: ir.Value) -> Gradients:
    """Selects instead of multiplying by a mask: the branch not taken may have an infinite gradient."""
    condition, zero = ctx.input(0), ctx.scalar(0, dy)
    dx = _sum_to(ctx, ctx.op("Where", condition, dy, zero), 1) if ctx.needs(1) else None
    dother = _sum_to(ctx, ctx.op("Where", condition, zero, dy), 2) if ctx.needs(2) else None
    return None, dx, dother


@rule("Pow", any_float=True)
def pow_(ctx: Context, dy: ir.Value) -> Gradients:
    """dx = dy * e * x^(e - 1), for an exponent that is not trained."""
    x, exponent = ctx.input(0), ctx.input(1)
    value = constant_array(exponent)
    if value is not None:
        e = value.astype((x.dtype or ir.DataType.FLOAT).numpy())
        if e.size == 1 and e.item() == 2.0:
            slope = ctx.times(x, 2.0)
        else:
            # The power of x that goes with e == 0 does not matter; x^-1 could be infinite.
            below = np.where(e == 0, np.ones_like(e), e) - np.ones_like(e)
            slope = ctx.mul(ctx.op("Pow", x, ctx.array(below)), ctx.array(e))
    else:
        e_float = ctx.as_float(exponent, x)
        slope = ctx.mul(ctx.op("Pow", x, ctx.sub(e_float, ctx.scalar(1, x))), e_float)
    return [_sum_to(ctx, ctx.mul(dy, slope), 0)]


@rule("Identity", any_float=True)
def identity(ctx: Context, dy: ir.Value) -> Gradients:
    return [dy]


def _cast_to_integer(node: ir.Node) -> tuple[int, ...]:
    to = ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT.value))
    return () if to.is_floating_point() else (0,)


@rule("Cast", any_float=True, stops=_cast_to_integer)
def cast(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.as_float(dy, ctx.input(0))]


@rule("Neg", any_float=True)
def neg(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.neg(dy)]


@rule("Abs", any_float=True)
def abs_(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.mul(dy, ctx.op("Sign", ctx.input(0)))]


@rule("Sqrt", any_float=True)
def sqrt(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.div(ctx.times(dy, 0.5), ctx.output())]


@rule("Exp", any_float=True)
def exp(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.mul(dy, ctx.output())]


@rule("Log", any_float=True)
def log(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.div(dy, ctx.input(0))]


@rule("Reciprocal", any_float=True)
def reciprocal(ctx: Context, dy: ir.Value) -> Gradients:
    y = ctx.output()
    return [ctx.neg(ctx.mul(dy, ctx.mul(y, y)))]


@rule("Erf", any_float=True)
def erf(ctx: Context, dy: ir.Value) -> Gradients:
    """derf/dx = 2 / sqrt(pi) * exp(-x^2)."""
    x = ctx.input(0)
    bell = ctx.op("Exp", ctx.neg(ctx.mul(x, x)))
    return [ctx.mul(dy, ctx.times(bell, 2 / math.sqrt(math.pi)))]


@rule("Sin", any_float=True)
def sin(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.mul(dy, ctx.op("Cos", ctx.input(0)))]


@rule("Cos", any_float=True)
def cos(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.neg(ctx.mul(dy, ctx.op("Sin", ctx.input(0))))]


def _sum_to(ctx: Context, gradient: ir.Value, index: int) -> ir.Value:
    return ctx.sum_to(gradient, ctx.input(index), dims_of(ctx.output()))
