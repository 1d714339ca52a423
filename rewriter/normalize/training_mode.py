"""Tells of nodes that behave as in training: a sign that the model was exported in the wrong mode."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.operators import is_operator


def training_mode_warnings(model: ir.Model) -> list[str]:
    """At most one sentence for Dropout and one for BatchNormalization, with a node's name; for the manifest.

    Dropout whose mode a caller or another node says counts as well: its outputs can be random.
    """
    dropouts, batch_norms = [], []
    for node in model.graph.all_nodes():
        if is_operator(node, "Dropout") and _may_drop(node):
            dropouts.append(node)
        elif is_operator(node, "BatchNormalization") and node.attributes.get_int("training_mode", 0) == 1:
            batch_norms.append(node)
    warnings = []
    if dropouts:
        warnings.append(
            f"{_these(dropouts)} can be in training mode: outputs are random, and so are calibration and the "
            "int8 model; export the model in inference mode."
        )
    if batch_norms:
        warnings.append(
            f"{_these(batch_norms)} in training mode: as exported it normalizes with the statistics of each "
            "batch. Where the recipe trains batch norms it is taken for one with its running statistics; "
            "with batch_norm = fold_inference it stays as it is, and outputs depend on the batch."
        )
    return warnings


def _may_drop(node: ir.Node) -> bool:
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return False
    value = constant_array(mode)
    return value is None or bool(value.any())


def _these(nodes: list[ir.Node]) -> str:
    others = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return f"{nodes[0].op_type} {nodes[0].name!r}{others}"
