"""What each target asks for: one policy a target, as data that placement and folding read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from rewriter.operators import OPERATORS
from rewriter.recipe import FoldStatistics


@dataclasses.dataclass(frozen=True)
class IntegerOperators:
    """Which operators a runtime computes in integers, and what it fuses into them.

    Attributes:
        quantized: operator types whose inputs and outputs get quantizers.
        fused_activations: activations that the runtime computes together with a quantized operator, so that
            no quantizer stands between the two. Clip only with constant bounds.
        fuses_bias_add: whether an Add of a constant to a layer's result is part of the layer.
        shares_range: operators that only move data and run on integers with the scale of their input.
        quantizes_outputs: whether the results of quantized operators are quantized, not only what
            quantized operators read.
        writes_float: operators with integer kernels that can write float: their result is quantized only
            where a quantized operator reads it.
        between_integers: element-wise operators that are quantized only between integers
            (`placement.elementwise`).
    """

    quantized: frozenset[str]
    fused_activations: frozenset[str]
    fuses_bias_add: bool
    shares_range: frozenset[str]
    quantizes_outputs: bool
    writes_float: frozenset[str]
    between_integers: frozenset[str]


@dataclasses.dataclass(frozen=True)
class TargetPolicy:
    """Where a target wants quantizers, and how ranges and batch norms are treated.

    Attributes:
        operators: what its runtime computes in integers; None: quantizers stand where tf.contrib.quantize
            put them (`placement.tf_contrib`).
        symmetric_weights: whether weights are symmetric whatever the recipe's `symmetric` says of
            activations; otherwise they are as it says.
        fold_statistics: what the statistics of the batch are taken of when a batch norm is folded in
            training, unless the recipe says it.
        bessel_correction: whether the running variance takes in n / (n - 1) times the variance of the batch,
            an estimate of that of all data.
    """

    operators: IntegerOperators | None
    symmetric_weights: bool
    fold_statistics: FoldStatistics
    bessel_correction: bool


# onnxruntime matches DQ -> operator -> Q groups (QDQ format): every input and the output need a pair. It
# drops a Relu or Clip before QuantizeLinear where the integer range already saturates there; what it cannot
# drop `rewriter.fold.activations` turns into integer bounds. QGemm and MatMulIntegerToFloat need no pair at
# their output, and do without where nothing in integers follows: class scores, attention scores, the input of
# a GELU or LayerNorm. A pair there costs accuracy, and starves training: scores outside the calibrated range
# have no gradient, and a new task or longer training takes them all outside.
_ONNXRUNTIME_OPERATORS: Final = IntegerOperators(
    quantized=frozenset(
        ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool")
    ),
    fused_activations=frozenset(("Relu", "Clip")),
    fuses_bias_add=True,
    shares_range=frozenset(op for op, traits in OPERATORS.items() if traits.kind == "movement"),
    quantizes_outputs=True,
    writes_float=frozenset(("Gemm", "MatMul")),
    between_integers=frozenset(("Add", "Mul")),
)

_ONNXRUNTIME: Final = TargetPolicy(
    operators=_ONNXRUNTIME_OPERATORS,
    symmetric_weights=True,
    fold_statistics="quantized_layer",
    bessel_correction=False,  # ONNX defines BatchNormalization with the variance of the batch itself
)

# What TensorFlow 1.15 did, for results that can be compared with its own.
_TF_CONTRIB: Final = TargetPolicy(
    operators=None,
    symmetric_weights=False,
    fold_statistics="float_layer",
    bessel_correction=True,
)

TARGETS: Final[Mapping[str, TargetPolicy]] = {"onnxruntime": _ONNXRUNTIME, "tf_contrib": _TF_CONTRIB}
