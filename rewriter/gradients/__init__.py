"""Gradients of an ONNX graph: `differentiate` appends them, `trainability` says where there are none."""

from rewriter.gradients import (
    activation,
    convolution,
    elementwise,
    linear,
    loss,
    movement,
    normalization,
    pooling,
    quantizer,
    reduction,
)
from rewriter.gradients.engine import Trainability, differentiate, trainability

__all__ = ["Trainability", "differentiate", "trainability"]

# Importing a family of rules is what puts it into the table.
_FAMILIES = (
    activation,
    convolution,
    elementwise,
    linear,
    loss,
    movement,
    normalization,
    pooling,
    quantizer,
    reduction,
)
