"""Gradients of an ONNX graph: `differentiate` appends them, `trainability` says where there are none."""

# Importing a family of rules is what puts it into the table.
import rewriter.gradients.activation
import rewriter.gradients.batch_norm
import rewriter.gradients.convolution
import rewriter.gradients.elementwise
import rewriter.gradients.linear
import rewriter.gradients.loss
import rewriter.gradients.movement
import rewriter.gradients.normalization
import rewriter.gradients.pooling
import rewriter.gradients.quantizer
import rewriter.gradients.reduction  # noqa: F401
from rewriter.gradients.engine import Trainability, differentiate, trainability

__all__ = ["Trainability", "differentiate", "trainability"]
