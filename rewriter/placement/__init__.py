"""Placement: which tensor gets which quantizer, which share one, what is skipped and why. Decides only.

Where quantizers stand is the target's (`rewriter.targets`): around the operators that a runtime computes in
integers (`placement.integer_operators`), or where tf.contrib.quantize put them (`placement.tf_contrib`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.placement import integer_operators, tf_contrib
from rewriter.placement.drafts import plan_of
from rewriter.placement.settings import require_matches
from rewriter.quantization import Plan, Skipped
from rewriter.recipe import Recipe
from rewriter.targets import TARGETS

__all__ = ["place"]


def place(model: ir.Model, recipe: Recipe) -> Plan:
    """Decide on the quantizers of a normalized model; the model is not changed.

    Returns:
        quantizers and nodes in graph order. Every Conv, ConvTranspose, Gemm and MatMul of the model is in
        `quantized_nodes` or `skipped`; one in both is quantized in a coarser way than the recipe asks.

    Raises:
        QatError: `recipe_scope_unmatched`, `nothing_to_quantize`.
    """
    graph = model.graph
    policy = TARGETS[recipe.target]
    require_matches(graph.all_nodes(), recipe)
    if policy.operators is None:
        decision = tf_contrib.decide(graph, recipe, policy)
    else:
        decision = integer_operators.decide(graph, recipe, policy, policy.operators)
    if not decision.quantized_nodes and not decision.drafts:
        raise QatError(
            ErrorCode.NOTHING_TO_QUANTIZE,
            "No operator of the model can be quantized for the target "
            f"{recipe.target!r}{_first_reason(decision.skipped)}; see the recipe's scope and overrides.",
        )
    return plan_of(decision, model, recipe)


def _first_reason(skipped: Sequence[Skipped]) -> str:
    return f" (first: {skipped[0].op} {skipped[0].node!r}: {skipped[0].reason})" if skipped else ""
