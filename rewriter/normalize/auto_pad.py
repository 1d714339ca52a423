"""Writes automatic padding of convolutions and pooling as explicit pads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.normalize.graphs import owning_graph


@dataclasses.dataclass(frozen=True)
class _Padding:
    """How an operator's pads act.

    Attributes:
        fill: what padded elements count as, for a Pad in front of the operator; None: a Pad in front would
            change the result, as padded elements are left out of the average.
    """

    fill: float | None


_OPERATORS: Final[Mapping[str, _Padding]] = {
    "Conv": _Padding(fill=0.0),
    "MaxPool": _Padding(fill=-np.inf),
    "AveragePool": _Padding(fill=None),
    "LpPool": _Padding(fill=0.0),
}


class ExplicitPadsPass(ir.passes.InPlacePass):
    """Replaces auto_pad by pads, dimension by dimension.

    1. NOTSET and VALID: the attribute is dropped.
    2. SAME_*: ceil(size / stride) outputs; with stride 1 the pads do not depend on the size.
    3. SAME_* with a stride and an unknown size: a Pad node computes the pads while the model runs.
       AveragePool that leaves padded elements out of the average cannot be written so: model_unsupported.
    4. ConvTranspose: size * stride outputs, which fixes the pads whatever the size; with output_shape the
       size must be known.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        names = FreeNames(model)
        for node in model.graph:
            if node.domain != "" or "auto_pad" not in node.attributes:
                continue
            if node.op_type == "ConvTranspose":
                _make_transposed_explicit(node)
                modified = True
            elif node.op_type in _OPERATORS:
                _make_explicit(node, _OPERATORS[node.op_type], names)
                modified = True
        return ir.passes.PassResult(model, modified)


@dataclasses.dataclass(frozen=True)
class _Window:
    """Kernel geometry, one entry a spatial dimension; `size` is -1 where it is not known."""

    size: tuple[int, ...]
    extent: tuple[int, ...]  # dilated kernel size
    stride: tuple[int, ...]


def _window(node: ir.Node) -> _Window:
    kernel = node.attributes.get_ints("kernel_shape")
    if kernel is None:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or weight.shape is None or any(not isinstance(d, int) for d in weight.shape[2:]):
            raise _unsupported(node, "the size of its kernel is not known")
        kernel = [int(d) for d in weight.shape[2:]]
    rank = len(kernel)
    stride = node.attributes.get_ints("strides") or [1] * rank
    dilation = node.attributes.get_ints("dilations") or [1] * rank
    x = node.inputs[0]
    shape = None if x is None else x.shape
    size = [-1] * rank if shape is None else [d if isinstance(d, int) else -1 for d in shape[2:]]
    if not len(size) == len(stride) == len(dilation) == rank:
        raise QatError(
            ErrorCode.MODEL_INVALID, f"{node.op_type} does not fit the rank of its input.", node=node.name
        )
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    return _Window(tuple(size), extent, tuple(stride))


def _make_explicit(node: ir.Node, padding: _Padding, names: FreeNames) -> None:
    mode = node.attributes["auto_pad"].as_string()
    if mode in ("NOTSET", "VALID"):
        _drop_mode_without_pads(node, mode)
        return
    window = _window(node)
    totals = []
    for size, extent, stride in zip(window.size, window.extent, window.stride, strict=True):
        if stride == 1:
            totals.append(extent - 1)
        elif size >= 0:
            totals.append(max((-(-size // stride) - 1) * stride + extent - size, 0))
        else:
            _pad_while_running(node, window, padding, names, upper=mode == "SAME_UPPER")
            return
    _set_pads(node, *_split(totals, upper=mode == "SAME_UPPER"))
    # The number of outputs is exact with these pads; rounding up would add one.
    node.attributes.pop("ceil_mode", None)


def _split(totals: list[int], *, upper: bool) -> tuple[list[int], list[int]]:
    """Pads before and after; the odd one goes to the end for SAME_UPPER."""
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (small, large) if upper else (large, small)


def _set_pads(node: ir.Node, begin: list[int], end: list[int]) -> None:
    node.attributes.pop("auto_pad")
    node.attributes["pads"] = ir.AttrInt64s("pads", (*begin, *end))


def _drop_mode_without_pads(node: ir.Node, mode: str) -> None:
    """NOTSET: the pads are explicit already; VALID: there are none."""
    node.attributes.pop("auto_pad")
    if mode == "VALID":
        node.attributes.pop("pads", None)


def _make_transposed_explicit(node: ir.Node) -> None:
    mode = node.attributes["auto_pad"].as_string()
    if mode in ("NOTSET", "VALID"):
        _drop_mode_without_pads(node, mode)
        return
    window = _window(node)
    added = node.attributes.get_ints("output_padding") or [0] * len(window.extent)
    wanted = node.attributes.get_ints("output_shape")
    if wanted is not None:
        if -1 in window.size:
            raise _unsupported(node, "it has output_shape, and the size of its input is not known")
        node.attributes.pop("output_shape")
        wanted = wanted[-len(window.extent) :]
    totals = []
    for index, (extent, stride) in enumerate(zip(window.extent, window.stride, strict=True)):
        if wanted is None:
            total = extent + added[index] - stride
        else:
            total = (window.size[index] - 1) * stride + extent + added[index] - wanted[index]
        totals.append(total)
    if min(totals) < 0:
        raise _unsupported(node, "its kernel is smaller than its stride")
    _set_pads(node, *_split(totals, upper=mode == "SAME_UPPER"))


def _pad_while_running(
    node: ir.Node, window: _Window, padding: _Padding, names: FreeNames, *, upper: bool
) -> None:
    """total = max((ceil(size / stride) - 1) * stride + extent - size, 0), from the Shape of the input.

    With r = size mod stride, 0 replaced by stride, that is max(extent - r, 0); and r = (size - 1) mod
    stride + 1.
    """
    counted = bool(node.attributes.get_int("count_include_pad", 0))
    fill = 0.0 if padding.fill is None and counted else padding.fill
    x = node.inputs[0]
    if fill is None:
        raise _unsupported(
            node, "the size of its input is not known, and padded elements do not count; fix the input size"
        )
    assert x is not None
    graph, name = owning_graph(node), f"{node.outputs[0].name}_pad"

    def constant(what: str, *values: int) -> ir.Value:
        return add_initializer(graph, names.take(f"{name}_{what}"), np.array(values, np.int64))

    def apply(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        inner = ir.node(op_type, list(inputs), attributes)
        inner.outputs[0].name = names.take(f"{name}_{op_type}")
        graph.insert_before(node, inner)
        return inner.outputs[0]

    rank = len(window.extent)
    one, two = constant("one", 1), constant("two", 2)
    size = apply("Shape", x, start=2)
    rest = apply("Mod", apply("Sub", size, one), constant("strides", *window.stride))
    needed = apply("Sub", constant("extent", *(e - 1 for e in window.extent)), rest)
    total = apply("Max", needed, constant("zero", *[0] * rank))
    small = apply("Div", total, two)
    large = apply("Sub", total, small)
    begin, end = (small, large) if upper else (large, small)
    untouched = constant("untouched", 0, 0)
    pads = apply("Concat", untouched, begin, untouched, end, axis=0)
    dtype = np.dtype(np.float32) if x.dtype is None else x.dtype.numpy()
    fill_value = add_initializer(graph, names.take(f"{name}_fill"), np.asarray(fill, dtype))
    padded = apply("Pad", x, pads, fill_value)
    padded.type = x.type
    if x.shape is not None:
        padded.shape = ir.Shape([*x.shape[:2], *[None] * rank])
    node.replace_input_with(0, padded)
    node.attributes.pop("auto_pad")
    node.attributes.pop("pads", None)
    node.attributes.pop("ceil_mode", None)


def _unsupported(node: ir.Node, reason: str) -> QatError:
    return QatError(
        ErrorCode.MODEL_UNSUPPORTED,
        f"The automatic padding of {node.op_type} cannot be made explicit: {reason}.",
        node=node.name,
    )
