"""Learning rates: a linear warm-up, then half a cosine down to 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from rewriter.recipe import OptimizerName

# AdamW moves a parameter by about the learning rate whatever the gradient is; plain SGD by the rate times the
# gradient.
DEFAULT_LEARNING_RATE: Final[Mapping[OptimizerName, float]] = {"adamw": 1e-3, "sgd": 5e-2}


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """That of a step, from 0: `peak` is reached by the last step of the warm-up, or is that of the first."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def applied_rate(rate: float, optimizer: OptimizerName, accumulate: int) -> float:
    """The rate to set, so that a step takes the mean of the gradients that onnxruntime has summed.

    AdamW's step is the same for a multiple of all gradients, but for epsilon, which counts as
    epsilon / accumulate then.
    """
    return rate / accumulate if optimizer == "sgd" else rate
