"""Shapes of values: clean symbols at the inputs, everything else inferred."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from rewriter.normalize.limits import has_long_vector

BATCH = "batch"


class InferShapesPass(ir.passes.InPlacePass):
    """Infers types and shapes with ONNX's data propagation; a node it cannot handle stays unknown.

    Without it where a vector is so long that it would take minutes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logger = logging.getLogger(ShapeInferencePass.__module__)
        # The pass warns with a stack trace where inference gives up; shapes are only a help here.
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            follow = not has_long_vector(model)
            inference = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=follow)
            return inference(model)
        finally:
            logger.setLevel(level)


class CleanShapesPass(ir.passes.InPlacePass):
    """Gives every unknown dimension of an input a symbol of its own.

    1. A negative size (written by some exporters) or no size at all is an unknown dimension.
    2. "?" and "" are no symbols: two of them need not be equal.
    3. An unknown first dimension of an input of rank 2 or more is the batch.
    4. Negative sizes at other values are unknown too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in model.graph.inputs:
            if value.shape is None:
                continue
            named = [_named(value, index) for index in range(len(value.shape))]
            if named != list(value.shape):
                value.shape = ir.Shape(named)
                modified = True
        for node in model.graph.all_nodes():
            for value in node.outputs:
                if value.shape is not None and any(_is_unknown(dim) for dim in value.shape):
                    value.shape = ir.Shape([None if _is_unknown(dim) else dim for dim in value.shape])
                    modified = True
        return ir.passes.PassResult(model, modified)


def _named(value: ir.Value, index: int) -> int | ir.SymbolicDim | str:
    assert value.shape is not None
    dim = value.shape[index]
    if not _is_unknown(dim):
        return dim
    return BATCH if index == 0 and len(value.shape) > 1 else f"{value.name}_dim_{index}"


def _is_unknown(dim: int | ir.SymbolicDim) -> bool:
    if isinstance(dim, int):
        return dim < 0
    return dim.value in (None, "", "?")


def forget_shapes(graph: ir.Graph) -> None:
    """Drop the shapes of all values that standard operators compute, outputs of the graph included."""
    for node in graph.all_nodes():
        if node.domain == "":
            for value in node.outputs:
                value.shape = None
