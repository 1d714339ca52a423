"""Gradient rule of the cross-entropy loss; the other losses are plain arithmetic."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.gradients.context import Context
from rewriter.gradients.registry import Gradients, rule


@rule("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(ctx: Context, dy: ir.Value) -> Gradients:
    """d/dscores, from the log-probabilities that the node gives as its second output."""
    attributes = ctx.node.attributes
    options: dict[str, Any] = {"reduction": attributes.get_string("reduction", "mean")}
    if "ignore_index" in attributes:
        options["ignore_index"] = attributes["ignore_index"].as_int()
    labels, weights = ctx.input(1), ctx.optional(2)
    inputs = [dy, ctx.output(1), labels, *([] if weights is None else [weights])]
    return [ctx.ms("SoftmaxCrossEntropyLossGrad", *inputs, **options)]
