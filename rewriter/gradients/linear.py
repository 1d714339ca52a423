"""Gradient rules of the matrix products."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.gradients.context import Context, Dimensions, dims_of, rank_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.initializers import constant_array


@rule("Gemm", inputs=None)
def gemm(ctx: Context, dy: ir.Value) -> Gradients:
    """Y = alpha * A' B' + beta * C, with A' = A or its transpose, B' likewise, C broadcast to Y."""
    attributes = ctx.node.attributes
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    trans_a, trans_b = attributes.get_int("transA", 0), attributes.get_int("transB", 0)
    a, b, c = ctx.input(0), ctx.input(1), ctx.optional(2)

    def product(left: ir.Value, right: ir.Value, trans_left: int, trans_right: int) -> ir.Value:
        return ctx.op("Gemm", left, right, alpha=alpha, transA=trans_left, transB=trans_right)

    da = db = dc = None
    if ctx.needs(0):
        da = product(b, dy, trans_b, 1) if trans_a else product(dy, b, 0, 1 - trans_b)
    if ctx.needs(1):
        db = product(dy, a, 1, trans_a) if trans_b else product(a, dy, 1 - trans_a, 0)
    if ctx.needs(2) and c is not None:
        dc = ctx.times(ctx.sum_to(dy, c, dims_of(ctx.output())), beta)
    return da, db, dc


def _unknown_rank(node: ir.Node) -> str | None:
    a, b = (rank_of(value) for value in node.inputs)
    if b in (1, 2) or (a is not None and b is not None):
        return None
    return "the rank of its operands is not known, so that a vector cannot be told from a matrix"


@rule("MatMul", inputs=None, obstacle=_unknown_rank)
def matmul(ctx: Context, dy: ir.Value) -> Gradients:
    if rank_of(ctx.input(1)) == 1:
        return _times_vector(ctx, dy)
    if rank_of(ctx.input(1)) == 2:
        return _times_matrix(ctx, dy)
    return _batched(ctx, dy)


def _times_vector(ctx: Context, dy: ir.Value) -> Gradients:
    """Y[...] = sum_k A[..., k] b[k]: an outer product each way."""
    a, b = ctx.input(0), ctx.input(1)
    column = ctx.op("Unsqueeze", dy, ctx.ints(-1))
    da = ctx.mul(column, b) if ctx.needs(0) else None
    db = None
    if ctx.needs(1):
        rows = ctx.op("Reshape", ctx.mul(column, a), _rows_of(ctx, b, 0))
        db = ctx.op("ReduceSum", rows, ctx.ints(0), keepdims=0)
    return da, db


def _times_matrix(ctx: Context, dy: ir.Value) -> Gradients:
    """Y = A B with a matrix B: all leading dimensions of A are rows of one product.

    A product per batch entry and a sum would compute dB too, at the cost of a [batch, K, N] tensor.
    """
    a, b = ctx.input(0), ctx.input(1)
    flat = rank_of(a) == 2
    dy_rows = dy if flat else ctx.op("Reshape", dy, _rows_of(ctx, b, 1))
    da = db = None
    if ctx.needs(0):
        da = ctx.op("Gemm", dy_rows, b, transB=1)
        da = da if flat else ctx.reshape_like(da, a)
    if ctx.needs(1):
        a_rows = a if flat else ctx.op("Reshape", a, _rows_of(ctx, b, 0))
        db = ctx.op("Gemm", a_rows, dy_rows, transA=1)
    return da, db


def _batched(ctx: Context, dy: ir.Value) -> Gradients:
    """Y = A B with broadcast batch dimensions; a vector A is a matrix of one row."""
    a, b, y = ctx.input(0), ctx.input(1), ctx.output()
    vector = rank_of(a) == 1
    if vector:
        a, dy = ctx.op("Unsqueeze", a, ctx.ints(0)), ctx.op("Unsqueeze", dy, ctx.ints(-2))
    da = db = None
    if ctx.needs(0):
        da = ctx.ms("FusedMatMul", dy, b, transB=1)
        if vector:
            rows = ctx.op("Reshape", da, _rows_of(ctx, ctx.input(0), 0))
            da = ctx.op("ReduceSum", rows, ctx.ints(0), keepdims=0)
        else:
            da = ctx.sum_to(da, a, _product_dims(y, a))
    if ctx.needs(1):
        db = ctx.ms("FusedMatMul", a, dy, transA=1)
        if not vector:  # otherwise the batch dimensions are those of B alone
            db = ctx.sum_to(db, b, _product_dims(y, b))
    return da, db


def _product_dims(y: ir.Value, operand: ir.Value) -> Dimensions | None:
    """The dimensions of an operand's gradient before it is summed over the broadcast batch dimensions."""
    dims, operand_dims = dims_of(y), dims_of(operand)
    return None if dims is None or operand_dims is None else (*dims[:-2], *operand_dims[-2:])


def _rows_of(ctx: Context, value: ir.Value, axis: int) -> ir.Value:
    """The shape [-1, size of `axis`], for Reshape."""
    size = ctx.dimension(value, axis)
    known = constant_array(size)
    if known is not None:
        return ctx.ints(-1, int(known[0]))
    return ctx.op("Concat", ctx.ints(-1), size, axis=0)
