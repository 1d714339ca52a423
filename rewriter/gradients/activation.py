"""Gradient rules of the activation functions."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.gradients.context import Context, Mask, dims_of
from rewriter.gradients.registry import Gradients, rule

_SELU_ALPHA = 1.67326319217681884765625
_SELU_GAMMA = 1.05070102214813232421875


@rule("Relu")
def relu(ctx: Context, dy: ir.Value) -> Gradients:
    """dy where y > 0."""
    y = ctx.output()
    return [dy if ctx.is_zero_with(dy, y) else ctx.masked(dy, ctx.where_positive(y))]


@rule("LeakyRelu")
def leaky_relu(ctx: Context, dy: ir.Value) -> Gradients:
    """dy where x > 0, else alpha * dy.

    com.microsoft.LeakyReluGrad takes half as long again on the CPU.
    """
    x, alpha = ctx.input(0), ctx.node.attributes.get_float("alpha", 0.01)
    positive = ctx.masked(dy, ctx.where_positive(x))
    return [ctx.add(ctx.times(positive, 1 - alpha), ctx.times(dy, alpha))]


@rule("Clip")
def clip(ctx: Context, dy: ir.Value) -> Gradients:
    """dy where the bounds changed nothing."""
    return [ctx.masked(dy, ctx.where_equal(ctx.input(0), ctx.output()))]


@rule("ThresholdedRelu")
def thresholded_relu(ctx: Context, dy: ir.Value) -> Gradients:
    x = ctx.input(0)
    alpha = ctx.scalar(ctx.node.attributes.get_float("alpha", 1.0), x)
    return [ctx.masked(dy, Mask(ctx.op("Greater", x, alpha)))]


@rule("HardSigmoid")
def hard_sigmoid(ctx: Context, dy: ir.Value) -> Gradients:
    """y = clip(alpha * x + beta, 0, 1): alpha * dy where 0 < y < 1."""
    y = ctx.output()
    inside = Mask(ctx.op("And", ctx.op("Greater", y, ctx.scalar(0, y)), ctx.op("Less", y, ctx.scalar(1, y))))
    return [ctx.times(ctx.masked(dy, inside), ctx.node.attributes.get_float("alpha", 0.2))]


@rule("HardSwish")
def hard_swish(ctx: Context, dy: ir.Value) -> Gradients:
    """y = x * clip(x/6 + 1/2, 0, 1): the slope is the clip, plus x/6 where |x| < 3."""
    x = ctx.input(0)
    gate = ctx.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    inside = Mask(ctx.op("Less", ctx.op("Abs", x), ctx.scalar(3, x)))
    return [ctx.mul(dy, ctx.add(gate, ctx.masked(ctx.times(x, 1 / 6), inside)))]


@rule("Elu")
def elu(ctx: Context, dy: ir.Value) -> Gradients:
    """y = x, or alpha * (exp(x) - 1) for x <= 0, where the slope is y + alpha."""
    return [_exponential_tail(ctx, dy, ctx.node.attributes.get_float("alpha", 1.0), 1.0)]


@rule("Selu")
def selu(ctx: Context, dy: ir.Value) -> Gradients:
    """gamma times Elu."""
    attributes = ctx.node.attributes
    gamma = attributes.get_float("gamma", _SELU_GAMMA)
    return [_exponential_tail(ctx, dy, gamma * attributes.get_float("alpha", _SELU_ALPHA), gamma)]


@rule("Celu")
def celu(ctx: Context, dy: ir.Value) -> Gradients:
    """y = x, or alpha * (exp(x / alpha) - 1) for x <= 0, where the slope is y / alpha + 1."""
    x, y = ctx.input(0), ctx.output()
    tail = ctx.add(ctx.times(y, 1 / ctx.node.attributes.get_float("alpha", 1.0)), ctx.scalar(1, y))
    return [ctx.mul(dy, ctx.op("Where", _positive(ctx, x), ctx.scalar(1, y), tail))]


@rule("PRelu", inputs=None)
def prelu(ctx: Context, dy: ir.Value) -> Gradients:
    """y = x, or slope * x for x < 0; the slope is broadcast to x."""
    x, slope = ctx.input(0), ctx.input(1)
    dx = None
    if ctx.needs(0):
        dx = ctx.mul(dy, ctx.op("Where", _positive(ctx, x), ctx.scalar(1, x), slope))
    dslope = None
    if ctx.needs(1):
        negative_part = ctx.op("Min", x, ctx.scalar(0, x))
        dslope = ctx.sum_to(ctx.mul(dy, negative_part), slope, dims_of(ctx.output()))
    return dx, dslope


@rule("Sigmoid")
def sigmoid(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.ms("SigmoidGrad", dy, ctx.output())]


@rule("Tanh")
def tanh(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.ms("TanhGrad", dy, ctx.output())]


@rule("Softplus")
def softplus(ctx: Context, dy: ir.Value) -> Gradients:
    return [ctx.mul(dy, ctx.op("Sigmoid", ctx.input(0)))]


@rule("Softsign")
def softsign(ctx: Context, dy: ir.Value) -> Gradients:
    """y = x / (1 + |x|): dy / (1 + |x|)^2."""
    x = ctx.input(0)
    base = ctx.add(ctx.op("Abs", x), ctx.scalar(1, x))
    return [ctx.div(dy, ctx.mul(base, base))]


@rule("Mish")
def mish(ctx: Context, dy: ir.Value) -> Gradients:
    """y = x * t, t = tanh(softplus(x)): the slope is t + x * (1 - t^2) * sigmoid(x)."""
    x = ctx.input(0)
    t = ctx.op("Tanh", ctx.op("Softplus", x))
    dt = ctx.ms("TanhGrad", ctx.op("Sigmoid", x), t)
    return [ctx.mul(dy, ctx.add(t, ctx.mul(x, dt)))]


@rule("Softmax")
def softmax(ctx: Context, dy: ir.Value) -> Gradients:
    axis = ctx.node.attributes.get_int("axis", -1)
    return [ctx.ms("SoftmaxGrad_13", dy, ctx.output(), axis=axis)]


@rule("LogSoftmax")
def log_softmax(ctx: Context, dy: ir.Value) -> Gradients:
    axis = ctx.node.attributes.get_int("axis", -1)
    return [ctx.ms("LogSoftmaxGrad_13", dy, ctx.output(), axis=axis)]


def _exponential_tail(ctx: Context, dy: ir.Value, tail_scale: float, slope: float) -> ir.Value:
    """dy * slope for x > 0, dy * (y + tail_scale) elsewhere."""
    x, y = ctx.input(0), ctx.output()
    tail = ctx.add(y, ctx.scalar(tail_scale, y))
    return ctx.mul(dy, ctx.op("Where", _positive(ctx, x), ctx.scalar(slope, y), tail))


def _positive(ctx: Context, x: ir.Value) -> ir.Value:
    return ctx.op("Greater", x, ctx.scalar(0, x))
