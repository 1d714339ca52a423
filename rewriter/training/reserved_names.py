"""Names that onnxruntime-training keeps for itself in a training model."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from rewriter.names import FreeNames
from rewriter.training import layout

# Inputs and outputs of the training model, made of the names of parameters.
_INTERFACE: Final = (layout.BUFFER, layout.ACCUMULATED)


def is_reserved(name: str) -> bool:
    """Whether onnxruntime-training takes an input of this name for a gradient, and keeps an output back."""
    return name == layout.RESET or name.endswith((layout.GRADIENT, *_INTERFACE))


def free_reserved_names(model: ir.Model) -> None:
    """Rename the initializers and inner values of `model`, in place, that have the name of an input or output
    of a training model.

    The model's inputs and outputs keep theirs: these are its interface.
    """
    reserved = [
        value
        for graph in model.graphs()
        for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs))
        if _may_collide(value.name or "") and not value.is_graph_input() and not value.is_graph_output()
    ]
    rename(reserved, FreeNames(model))


def _may_collide(name: str) -> bool:
    return name == layout.RESET or name.endswith(_INTERFACE)


def rename(values: list[ir.Value], names: FreeNames) -> None:
    """Give each value a free name like the one it has."""
    for value in values:
        value.name = names.take(f"{value.name}_renamed")
