"""What each target runtime quantizes: one policy a target, as data that placement reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final


@dataclasses.dataclass(frozen=True)
class TargetPolicy:
    """Which operators a runtime computes in integers, and what it fuses into them.

    Attributes:
        quantized: operator types whose inputs and outputs get quantizers.
        fused_activations: activations that the runtime computes together with a quantized operator, so that
            no quantizer stands between the two. Clip only with constant bounds.
        fuses_bias_add: whether an Add of a constant to a layer's result is part of the layer.
        shares_range: operators that only move data and run on integers with the scale of their input.
        quantizes_outputs: whether the results of quantized operators are quantized, not only what
            quantized operators read.
    """

    quantized: frozenset[str]
    fused_activations: frozenset[str]
    fuses_bias_add: bool
    shares_range: frozenset[str]
    quantizes_outputs: bool


# onnxruntime matches DQ -> operator -> Q groups (QDQ format): every input and the output need a pair. It
# drops a Relu or Clip before QuantizeLinear where the integer range already saturates there; what it cannot
# drop `rewriter.fold.activations` turns into integer bounds.
_ONNXRUNTIME: Final = TargetPolicy(
    quantized=frozenset(
        ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool")
    ),
    fused_activations=frozenset(("Relu", "Clip")),
    fuses_bias_add=True,
    shares_range=frozenset(
        (
            "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape",
            "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
        )
    ),
    quantizes_outputs=True,
)  # fmt: skip

TARGETS: Final[Mapping[str, TargetPolicy]] = {"onnxruntime": _ONNXRUNTIME}
