"""Gradient rules of the quantizer nodes: the straight-through estimator, and LSQ for the scale.

    dx = dy where round(x / s) + z, unclipped, lies in [qmin, qmax], else 0
    ds = g * sum(dy * ((y - x) / s where in range, else y / s))        g = 1 / sqrt(N * qmax)
    dz = g * sum(dy * (0 where in range, else -s))
    dbias = dy

(Esser et al. 2020, Learned Step Size Quantization; dz: Bhalgat et al. 2020, LSQ+, whose offset is -s z.)
N is the number of elements that share a scale: of a weight all of them, of an activation those of one sample,
its first axis being the batch.

In range means (qmin - m - z) s <= x <= (qmax + m - z) s: no division. With the margin m = 1/2 that is exact
for all but the ties; m = 0 (nearly, see `FakeQuantize.margin`) is the clipping of
tf.contrib.quantize. Where a gate is false everything is in range, and y = x makes ds and dz zero.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.fake_quantize import FakeQuantize
from rewriter.gradients.context import Context, dims_of, rank_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.initializers import constant_array


def _has_no_range_gradient(node: ir.Node) -> tuple[int, ...]:
    """Quantizing what is on the grid already changes nothing, whatever the scale; a range that is tracked is
    not trained."""
    quantizer = fake_quantize.read(node)
    return (1, 2) if quantizer.on_grid or quantizer.tracked else ()


def _unknown_rank(node: ir.Node) -> str | None:
    quantizer = fake_quantize.read(node)
    if quantizer.axis is not None and rank_of(quantizer.x) is None:
        return "the rank of its input is not known, and it quantizes per channel"
    return None


@rule(
    fake_quantize.OP_TYPE,
    domain=fake_quantize.DOMAIN,
    inputs=(0, 1, 2),
    stops=_has_no_range_gradient,
    obstacle=_unknown_rank,
)
def fake_quantize_gradient(ctx: Context, dy: ir.Value) -> Gradients:
    quantizer = fake_quantize.read(ctx.node)
    if quantizer.on_grid:
        return dy, None, None
    behind_relu = _is_behind_relu(ctx, quantizer)
    mask = _in_range(ctx, quantizer, only_positive=behind_relu)
    dx = ctx.masked(dy, mask)
    if behind_relu:
        ctx.set_zero_with(dx, quantizer.x)
    ds = dz = None
    per_tensor = quantizer.axis is None and bool(rank_of(quantizer.x))
    if ctx.needs(1) and not per_tensor:
        ds = _scale_gradient_by_mask(ctx, quantizer, dy, mask)
    if ctx.needs(2) or (ctx.needs(1) and per_tensor):
        outside = ctx.sub(dy, dx)  # what of dy does not pass to x
        if ctx.needs(1) and per_tensor:
            ds = _scale_gradient_per_tensor(ctx, quantizer, dx, outside)
        dz = _zero_point_gradient(ctx, quantizer, outside) if ctx.needs(2) else None
    return dx, ds, dz


@rule(fake_quantize.ROUND_OP_TYPE, domain=fake_quantize.DOMAIN)
def straight_through_round_gradient(ctx: Context, dy: ir.Value) -> Gradients:
    return (dy,)


@rule(fake_quantize.BIAS_OP_TYPE, domain=fake_quantize.DOMAIN, inputs=(0,), stops=lambda node: (1, 2))
def fake_quantize_bias_gradient(ctx: Context, dy: ir.Value) -> Gradients:
    """Straight through: int32 has no bounds to reach, and the scales have better work to do."""
    return (dy,)


def _is_behind_relu(ctx: Context, quantizer: FakeQuantize) -> bool:
    """Whether one mask can serve the quantizer and the Relu before it, whose gradient is zero where x is.

    There y is zero too, and adds nothing to ds; to dz it would.
    """
    producer = quantizer.x.producer()
    is_relu = producer is not None and (producer.domain, producer.op_type) == ("", "Relu")
    return is_relu and quantizer.axis is None and not ctx.needs(2)


def _in_range(ctx: Context, quantizer: FakeQuantize, *, only_positive: bool) -> ir.Value:
    x, scale, range_ = quantizer.x, quantizer.scale, quantizer.range
    lowest, highest = np.float32(range_.qmin - quantizer.margin), np.float32(range_.qmax + quantizer.margin)
    zero_point = constant_array(quantizer.zero_point)
    if zero_point is not None:
        z = zero_point.astype(np.float32)
        low, high = ctx.array(lowest - z), ctx.array(highest - z)
    else:
        shift = quantizer.zero_point
        shift = shift if shift.dtype == ir.DataType.FLOAT else ctx.as_float(shift, scale)
        low = ctx.sub(ctx.scalar(float(lowest), scale), shift)
        high = ctx.sub(ctx.scalar(float(highest), scale), shift)
    low, high = ctx.mul(scale, low), ctx.mul(scale, high)
    if quantizer.gate is not None:
        infinity = ctx.scalar(np.inf, scale)
        low = ctx.op("Where", quantizer.gate, low, ctx.scalar(-np.inf, scale))
        high = ctx.op("Where", quantizer.gate, high, infinity)
    if only_positive:
        low = ctx.scalar(float(np.finfo(np.float32).tiny), scale)  # zero is in every range: low was negative
    if quantizer.axis is None:
        clipped = ctx.op("Clip", x, low, high)
    else:
        along = ctx.ints(*(-1 if axis == _axis(quantizer) else 1 for axis in range(rank_of(x) or 0)))
        low, high = ctx.op("Reshape", low, along), ctx.op("Reshape", high, along)
        clipped = ctx.op("Min", ctx.op("Max", x, low), high)
    return ctx.op("Equal", x, clipped)


def _scale_gradient_by_mask(ctx: Context, quantizer: FakeQuantize, dy: ir.Value, mask: ir.Value) -> ir.Value:
    """Sums dy * (y - x or y): the difference first, whose rounding error is that of y - x, not of x."""
    error = ctx.sub(quantizer.output, ctx.masked(quantizer.x, mask))
    return _of_scale(ctx, quantizer, _total(ctx, quantizer, ctx.mul(dy, error)))


def _scale_gradient_per_tensor(
    ctx: Context, quantizer: FakeQuantize, dx: ir.Value, outside: ir.Value
) -> ir.Value:
    """Sums dx (y - x) + outside y: the same, as dx is dy or 0 and `outside` the rest of it.

    The sum of the products of two tensors is one pass here, a product of matrices per sample, of a row and a
    column. On [64, 16, 28, 28] 0.3 ms on one thread against 0.55 for Mul and ReduceSum, with a seventh of the
    rounding error. One product for all samples is no faster, and would leave a GPU idle. (dot(dy, y) -
    dot(dx, x) would be two passes less. It is a difference of large sums, and the loss drifts.)
    """
    y = quantizer.output
    sums = [_dot(ctx, dx, ctx.sub(y, quantizer.x)), _dot(ctx, outside, y)]
    return _of_scale(ctx, quantizer, ctx.add(*sums))


def _dot(ctx: Context, a: ir.Value, b: ir.Value) -> ir.Value:
    per_sample = ctx.ints(0, 1, -1)
    rows = [ctx.op("Reshape", value, per_sample) for value in (a, b)]
    return ctx.op("ReduceSum", ctx.ms("FusedMatMul", *rows, transB=1), keepdims=0)


def _of_scale(ctx: Context, quantizer: FakeQuantize, total: ir.Value) -> ir.Value:
    return ctx.mul(ctx.div(total, quantizer.scale), _gradient_scale(ctx, quantizer))


def _zero_point_gradient(ctx: Context, quantizer: FakeQuantize, outside: ir.Value) -> ir.Value:
    """The ends of the range move by -s with the zero point, and with them y."""
    total = ctx.neg(_total(ctx, quantizer, outside))
    return ctx.mul(ctx.mul(total, quantizer.scale), _gradient_scale(ctx, quantizer))


def _total(ctx: Context, quantizer: FakeQuantize, product: ir.Value) -> ir.Value:
    """The sum over the elements that share a scale."""
    if quantizer.axis is None:
        return ctx.op("ReduceSum", product, keepdims=0)
    others = [axis for axis in range(rank_of(quantizer.x) or 0) if axis != _axis(quantizer)]
    return ctx.op("ReduceSum", product, ctx.ints(*others), keepdims=0) if others else product


def _gradient_scale(ctx: Context, quantizer: FakeQuantize) -> ir.Value:
    """g = 1 / sqrt(N * qmax), a scalar; a constant where N is known."""
    x, qmax = quantizer.x, quantizer.range.qmax
    dims = dims_of(x)
    per_sample = not _is_weight(ctx, quantizer)
    if dims is not None:
        shared = [
            dim
            for axis, dim in enumerate(dims)
            if not (per_sample and axis == 0) and axis != _axis(quantizer)
        ]
        numbers = [dim for dim in shared if isinstance(dim, int)]
        if len(numbers) == len(shared):
            return ctx.scalar(1 / math.sqrt(max(math.prod(numbers), 1) * qmax), quantizer.scale)
    first = int(per_sample)
    if dims is None:  # one scale for all of it
        elements = ctx.product(ctx.shape(x, first), quantizer.scale)
    else:
        axes = [axis for axis in range(first, len(dims)) if axis != _axis(quantizer)]
        elements = ctx.elements(x, axes, quantizer.scale)
    return ctx.op("Reciprocal", ctx.op("Sqrt", ctx.times(elements, float(qmax))))


def _is_weight(ctx: Context, quantizer: FakeQuantize) -> bool:
    """Weights are quantized in a narrow range, from -qmax or from 1; activations never are.

    That also tells a weight that batch norm was folded into, and that so depends on the batch. A quantizer
    the model came with may use another range: there, a weight is what does not depend on the data.
    """
    return quantizer.range.qmin in (-quantizer.range.qmax, 1) or not ctx.depends_on_data(quantizer.x)


def _axis(quantizer: FakeQuantize) -> int | None:
    axis = quantizer.axis
    return axis + (rank_of(quantizer.x) or 0) if axis is not None and axis < 0 else axis
