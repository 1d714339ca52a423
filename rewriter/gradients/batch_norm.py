"""Gradient rules of the nodes that batch normalization consists of in training.

With n elements a channel:

    mean, v = ChannelStatistics(x)     dx = dmean / n + 2 dv (x - mean) / n
    y = ChannelAffine(x, a, b)         dx = a dy        da = sum(dy x)        db = sum(dy)

Together they are the gradient of batch normalization, through the statistics too; that of ChannelNormalize is
onnxruntime's own, in one node, and depsilon = -dscale scale r^2 / 2.
"""

from __future__ import annotations

import onnx_ir as ir

from rewriter.channel_operators import AFFINE, NORMALIZE, STATISTICS, all_but_channels, along_channels
from rewriter.fake_quantize import DOMAIN
from rewriter.gradients.context import Context, rank_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.operators import MICROSOFT


@rule(STATISTICS, domain=DOMAIN, outputs=2)
def channel_statistics(ctx: Context, dmean: ir.Value | None, dvariance: ir.Value | None) -> Gradients:
    x, mean = ctx.input(0), ctx.output(0)
    count = ctx.elements(x, all_but_channels(rank_of(x) or 0), x)
    zero = ctx.zeros_like(mean)
    slope = zero if dvariance is None else ctx.div(ctx.times(dvariance, 2.0), count)
    shift = ctx.sub(zero if dmean is None else ctx.div(dmean, count), ctx.mul(slope, mean))
    for vector in (slope, shift):
        vector.shape, vector.type = mean.shape, mean.type
    return [ctx.op(AFFINE, x, slope, shift, domain=DOMAIN)]


@rule(AFFINE, domain=DOMAIN, inputs=(0, 1, 2))
def channel_affine(ctx: Context, dy: ir.Value) -> Gradients:
    x, a = ctx.input(0), ctx.input(1)
    rank = rank_of(x) or 0
    others = ctx.ints(*all_but_channels(rank))
    dx = None
    if ctx.needs(0):
        dx = ctx.mul(dy, ctx.op("Reshape", a, ctx.ints(*along_channels(rank))) if rank > 2 else a)
    da = ctx.op("ReduceSum", ctx.mul(dy, x), others, keepdims=0) if ctx.needs(1) else None
    db = ctx.op("ReduceSum", dy, others, keepdims=0) if ctx.needs(2) else None
    return dx, da, db


@rule(NORMALIZE, domain=DOMAIN, inputs=(0, 1, 2, 3))
def channel_normalize(ctx: Context, dy: ir.Value) -> Gradients:
    x, scale = ctx.input(0), ctx.input(1)
    mean, r = ctx.output(1), ctx.output(3)
    dx, dscale, dshift = ctx.ops(
        "BatchNormalizationGrad",
        dy,
        x,
        scale,
        mean,
        r,
        domain=MICROSOFT,
        outputs=(True, True, True),
        epsilon=1e-5,  # required, and in r already
    )
    depsilon = None
    if ctx.needs(3):
        depsilon = ctx.times(ctx.mul(ctx.mul(dscale, scale), ctx.mul(r, r)), -0.5)
    return dx, dscale, dshift, depsilon
