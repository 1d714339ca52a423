"""Tells of Dropout that may drop: a sign that the model was exported in the wrong mode.

Batch norms in training mode are the business of `rewriter.fold.batch_norm`.
"""

from __future__ import annotations

import onnx_ir as ir

from rewriter.initializers import constant_array
from rewriter.operators import is_operator


def training_mode_warnings(model: ir.Model) -> list[str]:
    """At most one sentence, with a node's name; for the manifest.

    Dropout whose mode a caller or another node says counts as well: its outputs can be random.
    """
    dropouts = [node for node in model.graph.all_nodes() if is_operator(node, "Dropout") and _may_drop(node)]
    if not dropouts:
        return []
    others = f" and {len(dropouts) - 1} more" if len(dropouts) > 1 else ""
    return [
        f"Dropout {dropouts[0].name!r}{others} can be in training mode: outputs are random, and so are "
        "calibration and the int8 model; export the model in inference mode."
    ]


def _may_drop(node: ir.Node) -> bool:
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return False
    value = constant_array(mode)
    return value is None or bool(value.any())
