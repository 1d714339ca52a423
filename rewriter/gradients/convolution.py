"""Gradient rules of Conv and ConvTranspose, in one to three spatial dimensions.

com.microsoft.ConvGrad does the work, except where something else is faster on the CPU and as good on CUDA:

    dX  stride 1, large image, no more filters than channels   Conv(dY, W turned and transposed)
    dW  1x1 on a large image, neither strided nor padded        a product dY X' per sample, summed

ConvGrad works on one image at a time, and the second thread gains it little; Conv and FusedMatMul use all.
Milliseconds on two threads; batch x filters x channels, output image, kernel:

    dX  64x16x16  28x28 3x3             ConvGrad  5.4   Conv  2.9
        64x32x32  14x14 3x3                       4.5         3.1
        64x64x64    7x7 3x3                       3.7         4.2
        16x256x256 14x14 3x3                       60          65
        4x32x8    56x56 3x3                       2.0         3.6
        16x64x64  56x56 1x1                      11.2         5.2
        8x64x64   28x28 3x3, depthwise            2.2         1.2
    dW  16x64x64  56x56 1x1             ConvGrad  7.9   product  2.3
        16x512x128 28x28 1x1                     13.4           10.7
        8x512x512   7x7 1x1                       1.6            3.0

With a stride ConvTranspose is what ConvGrad is, and zeros inserted into dY cost five times as much. A dense
3x3 dW of stride 1 is a Conv with dY as its kernel: 10 to 30 percent faster on one thread, and the second one
helps (64x64x64 7x7: 3.6 to 1.4 ms). On CUDA it is one product of few rows that few multiprocessors share: it
is emitted for the recipe's training_device "cpu" alone. So is, for small images, a Conv of one image that
is all samples stacked on top of each other, as MLAS is good at long rows:

    dX  64x64x64    7x7 3x3             ConvGrad  4.8   Conv, stacked  4.1
        32x128x128  7x7 3x3                       6.7                  5.2
        32x512x512  7x7 3x3                        80                   57
        16x256x256 14x14 3x3                       35                   30
        64x32x32    7x7 3x3                       1.4                  2.1

The limits of ConvGrad, and what is done about them: on the CPU, groups in one and three dimensions overrun
the gradient buffer (1-D is computed as 2-D, 3-D group by group); on CUDA the padding must be symmetric (the
input is padded before, its gradient cropped after).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import onnx_ir as ir

from rewriter.gradients.context import Context, dims_of, rank_of
from rewriter.gradients.registry import Gradients, rule
from rewriter.operators import MICROSOFT

_TO_THE_END: Final = 2**63 - 1
_TO_THE_START: Final = -(2**63) + 1

# Elements of an output image per channel of the input from which on the forms above pay.
_LARGE_IMAGE: Final = 4
_LARGE_IMAGE_FOR_PRODUCT: Final = 6

_IMAGE_RANK: Final = 2
_CHANNELS_IN_A_RUN: Final = 16
_CHANNELS_WORTH_STACKING: Final = 64

_Wanted = tuple[bool, bool]  # dX, dW


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
    x, w = ctx.input(0), ctx.input(1)
    geometry = _Geometry.of(ctx.node, w, dy)
    dx = dw = None
    want_dx, want_dw = ctx.needs(0), ctx.needs(1)
    if want_dx and geometry is not None:
        if geometry.has_convolution_as_input_gradient:
            dx, want_dx = _input_gradient(ctx, dy, w, geometry), False
        elif ctx.for_cpu_only and geometry.has_stacked_convolution_as_input_gradient:
            dx, want_dx = _input_gradient_of_stacked_samples(ctx, dy, w, geometry), False
    if want_dw and geometry is not None and geometry.has_product_as_weight_gradient:
        dw, want_dw = _weight_gradient_of_1x1(ctx, dy, x, w), False
    image, out_image = (_numbers((dims_of(value) or ())[2:]) for value in (x, dy))
    by_convolution = geometry is not None and ctx.for_cpu_only and geometry.has_convolution_as_weight_gradient
    if want_dw and geometry is not None and by_convolution and image and out_image:
        dw, want_dw = _weight_gradient_by_convolution(ctx, dy, x, geometry, image, out_image), False
    if want_dx or want_dw:
        computed_dx, computed_dw = _conv_gradients(ctx, dy, x, w, want_dx=want_dx, want_dw=want_dw)
        dx, dw = dx or computed_dx, dw or computed_dw
    return dx, dw, _bias_gradient(ctx, dy)


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
        _, dw = _conv_gradients(ctx, x, dy, w, want_dx=False, want_dw=True)
    return dx, dw, _bias_gradient(ctx, dy)


def _bias_gradient(ctx: Context, dy: ir.Value) -> ir.Value | None:
    """dY summed over all but the channels."""
    if not ctx.needs(2):
        return None
    rank = _spatial_rank(ctx.node) or 0
    return ctx.op("ReduceSum", dy, ctx.ints(0, *range(2, rank + 2)), keepdims=0)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """A Conv whose sizes are known: its weight's, and those of an output image."""

    filters: int  # of a group, as the channels are
    channels: int
    out_image: Sequence[int]
    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    pads: Sequence[int]
    group: int

    @classmethod
    def of(cls, node: ir.Node, w: ir.Value, y: ir.Value) -> _Geometry | None:
        weight_dims, dims = _numbers(dims_of(w)), _numbers((dims_of(y) or ())[2:])
        if not weight_dims or not dims:
            return None
        attributes, rank = node.attributes, len(weight_dims) - 2
        group = attributes.get_int("group", 1)
        return cls(
            filters=weight_dims[0] // group,
            channels=weight_dims[1],
            out_image=dims,
            kernel=weight_dims[2:],
            strides=attributes.get_ints("strides", [1] * rank),
            dilations=attributes.get_ints("dilations", [1] * rank),
            pads=attributes.get_ints("pads", [0] * (2 * rank)),
            group=group,
        )

    @property
    def image(self) -> int:
        """Elements of one channel of the output."""
        return math.prod(self.out_image)

    @property
    def pads_of_input_gradient(self) -> list[int]:
        """What a Conv pads dY by, so that every element of X is reached as it reached Y; may be negative."""
        reach = [d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True)]
        return [r - pad for r, pad in zip((*reach, *reach), self.pads, strict=True)]

    @property
    def has_convolution_as_input_gradient(self) -> bool:
        return (
            all(stride == 1 for stride in self.strides)
            and min(self.pads_of_input_gradient) >= 0
            and self.image >= _LARGE_IMAGE * self.channels
            and (self._is_pointwise or self.filters <= self.channels)
        )

    @property
    def has_stacked_convolution_as_input_gradient(self) -> bool:
        """For small images that have as many rows as their input."""
        top, left, bottom, right = (
            self.pads_of_input_gradient if len(self.kernel) == _IMAGE_RANK else (-1,) * 4
        )
        return (
            all(stride == 1 for stride in self.strides)
            and min(top, left, bottom, right) >= 0
            and top + bottom == self.dilations[0] * (self.kernel[0] - 1) > 0
            and self.group == 1
            and self.channels >= max(self.filters, _CHANNELS_WORTH_STACKING)
        )

    @property
    def has_product_as_weight_gradient(self) -> bool:
        """A product per sample is as large as the weight: it must not outgrow dY."""
        return (
            self._is_pointwise
            and self.group == 1
            and all(stride == 1 for stride in self.strides)
            and not any(self.pads)
            and self.image >= _LARGE_IMAGE_FOR_PRODUCT * self.channels
        )

    @property
    def has_convolution_as_weight_gradient(self) -> bool:
        return (
            len(self.kernel) == _IMAGE_RANK
            and not self._is_pointwise
            and self.group == 1
            and self.channels >= _CHANNELS_IN_A_RUN
            and all(step == 1 for step in (*self.strides, *self.dilations))
        )

    @property
    def _is_pointwise(self) -> bool:
        return all(size == 1 for size in self.kernel)


def _numbers(dims: Sequence[int | ir.SymbolicDim] | None) -> list[int] | None:
    """The dimensions where all are known."""
    numbers = [d for d in dims or () if isinstance(d, int)]
    return numbers if dims is not None and len(numbers) == len(dims) else None


def _input_gradient(ctx: Context, dy: ir.Value, w: ir.Value, geometry: _Geometry) -> ir.Value:
    """Conv of dY with each filter turned around, channels and filters exchanged within their group."""
    return ctx.op(
        "Conv",
        dy,
        _turned_around(ctx, w, geometry),
        kernel_shape=list(geometry.kernel),
        dilations=list(geometry.dilations),
        pads=geometry.pads_of_input_gradient,
        group=geometry.group,
    )


def _input_gradient_of_stacked_samples(
    ctx: Context, dy: ir.Value, w: ir.Value, geometry: _Geometry
) -> ir.Value:
    """The same of one image, of all samples with rows of zeros between them, which are cut out afterwards."""
    top, _, bottom, _ = geometry.pads_of_input_gradient
    (rows, columns), gap = geometry.out_image, max(top, bottom)
    by_filter = ctx.op("Transpose", dy, perm=[1, 0, 2, 3])
    apart = ctx.op("Pad", by_filter, ctx.ints(0, 0, 0, 0, 0, 0, gap, 0))
    stacked = ctx.op("Reshape", apart, ctx.ints(1, geometry.filters, -1, columns))
    dx = _input_gradient(ctx, stacked, w, geometry)
    width = (
        columns
        + sum(geometry.pads_of_input_gradient[1::2])
        - geometry.dilations[1] * (geometry.kernel[1] - 1)
    )
    by_sample = ctx.op("Reshape", dx, ctx.ints(geometry.channels, -1, rows + gap, width))
    cut = ctx.op("Slice", by_sample, ctx.ints(0), ctx.ints(rows), ctx.ints(2))
    return ctx.op("Transpose", cut, perm=[1, 0, 2, 3])


def _turned_around(ctx: Context, w: ir.Value, geometry: _Geometry) -> ir.Value:
    rank, group = len(geometry.kernel), geometry.group
    spatial = range(2, rank + 2)
    if group == 1:
        exchanged = ctx.op("Transpose", w, perm=[1, 0, *spatial])
    else:
        sizes = (group, geometry.filters, geometry.channels, *geometry.kernel)
        grouped = ctx.op("Reshape", w, ctx.ints(*sizes))
        transposed = ctx.op("Transpose", grouped, perm=[0, 2, 1, *(axis + 1 for axis in spatial)])
        shape = ctx.ints(group * geometry.channels, geometry.filters, *geometry.kernel)
        exchanged = ctx.op("Reshape", transposed, shape)
    long = [axis for axis, size in zip(spatial, geometry.kernel, strict=True) if size > 1]
    if not long:
        return exchanged
    last, end, step = (ctx.ints(*[n] * len(long)) for n in (-1, _TO_THE_START, -1))
    return ctx.op("Slice", exchanged, last, end, ctx.ints(*long), step)


def _weight_gradient_by_convolution(
    ctx: Context,
    dy: ir.Value,
    x: ir.Value,
    geometry: _Geometry,
    image: list[int],
    out_image: list[int],
) -> ir.Value:
    """One Conv of one image: samples are its channels, dY its filters, (row, column and channel) its plane.

    With the channels of X innermost, the neighbouring elements of a row of dW are neighbours in memory, so
    that what MLAS copies for its product are runs as long as those of the forward pass.
    """
    height, width = image
    channels, (rows, columns) = geometry.channels, geometry.kernel
    innermost = ctx.op("Transpose", x, perm=[0, 2, 3, 1])
    top, left, bottom, right = geometry.pads
    product = ctx.op(
        "Conv",
        ctx.op("Reshape", innermost, ctx.ints(1, -1, height, width * channels)),
        ctx.op("Transpose", dy, perm=[1, 0, 2, 3]),
        kernel_shape=out_image,
        dilations=[1, channels],
        pads=[top, left * channels, bottom, right * channels],
    )
    separate = ctx.op("Reshape", product, ctx.ints(geometry.filters, rows, columns, channels))
    return ctx.op("Transpose", separate, perm=[0, 3, 1, 2])


def _weight_gradient_of_1x1(ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
    rows = ctx.ints(0, 0, -1)
    filters, channels = ctx.op("Reshape", dy, rows), ctx.op("Reshape", x, rows)
    products = ctx.ms("FusedMatMul", filters, channels, transB=1)
    return ctx.reshape_like(ctx.op("ReduceSum", products, ctx.ints(0), keepdims=0), w)


def _conv_gradients(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, *, want_dx: bool, want_dw: bool
) -> tuple[ir.Value | None, ir.Value | None]:
    """dX and dW of the Conv of `ctx.node`'s attributes, by ConvGrad; None what is not wanted."""
    attributes = _attributes(ctx.node)
    rank, group = _spatial_rank(ctx.node) or 0, ctx.node.attributes.get_int("group", 1)
    pads = list(ctx.node.attributes.get_ints("pads", [0] * (2 * rank)))
    begin, end = pads[:rank], pads[rank:]
    crop, wanted = begin != end, (want_dx, want_dw)
    if crop:
        x = ctx.op("Pad", x, ctx.ints(0, 0, *begin, 0, 0, *end))
        attributes["pads"] = [0] * (2 * rank)

    if group > 1 and rank == 1:
        dx, dw = _as_two_dimensional(ctx, dy, x, w, attributes, wanted)
    elif group > 1 and rank > 2:
        dx, dw = _group_by_group(ctx, dy, x, w, attributes, wanted)
    else:
        dx, dw = _conv_grad(ctx, dy, x, w, attributes, wanted)

    if crop and dx is not None:
        ends = [-p if p else _TO_THE_END for p in end]
        dx = ctx.op("Slice", dx, ctx.ints(*begin), ctx.ints(*ends), ctx.ints(*range(2, rank + 2)))
    return dx, dw


def _conv_grad(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, attributes: dict[str, Any], wanted: _Wanted
) -> tuple[ir.Value | None, ir.Value | None]:
    gradients = ctx.ops("ConvGrad", dy, x, w, domain=MICROSOFT, outputs=wanted, **attributes)
    dx, dw = (value if want else None for value, want in zip(gradients, wanted, strict=True))
    return dx, dw


def _as_two_dimensional(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, attributes: dict[str, Any], wanted: _Wanted
) -> tuple[ir.Value | None, ir.Value | None]:
    """A 1-D convolution is a 2-D one of height 1."""
    height = ctx.ints(2)
    neutral = {"kernel_shape": 1, "strides": 1, "dilations": 1, "pads": 0}
    for name, value in neutral.items():
        sizes = attributes.get(name)
        if isinstance(sizes, list):
            half = len(sizes) // 2 if name == "pads" else len(sizes)
            attributes[name] = [value, *sizes[:half], *([value, *sizes[half:]] if name == "pads" else [])]
    lifted = [ctx.op("Unsqueeze", value, height) for value in (dy, x, w)]
    dx, dw = _conv_grad(ctx, lifted[0], lifted[1], lifted[2], attributes, wanted)
    squeezed = [None if value is None else ctx.op("Squeeze", value, height) for value in (dx, dw)]
    return squeezed[0], squeezed[1]


def _group_by_group(
    ctx: Context, dy: ir.Value, x: ir.Value, w: ir.Value, attributes: dict[str, Any], wanted: _Wanted
) -> tuple[ir.Value | None, ir.Value | None]:
    group = ctx.node.attributes.get_int("group", 1)
    attributes["group"] = 1
    every = (True,) * group
    dys = ctx.ops("Split", dy, outputs=every, axis=1, num_outputs=group)
    xs = ctx.ops("Split", x, outputs=every, axis=1, num_outputs=group)
    ws = ctx.ops("Split", w, outputs=every, axis=0, num_outputs=group)
    parts = [_conv_grad(ctx, *one, attributes, wanted) for one in zip(dys, xs, ws, strict=True)]
    dx, dw = (
        ctx.op("Concat", *values, axis=axis) if want else None
        for values, axis, want in zip(zip(*parts, strict=True), (1, 0), wanted, strict=True)
    )
    return dx, dw


def _attributes(node: ir.Node) -> dict[str, Any]:
    """The attributes of the convolution with the same geometry."""
    attributes = node.attributes
    result: dict[str, Any] = {"group": attributes.get_int("group", 1)}
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        if name in attributes:
            result[name] = list(attributes[name].as_ints())
    return result
