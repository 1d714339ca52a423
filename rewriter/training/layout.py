"""Names and versions that onnxruntime-training 1.19 expects in the models of a bundle."""

from __future__ import annotations

from typing import Final

# Appended to a parameter's name.
GRADIENT: Final = "_grad"
ACCUMULATION: Final = "_grad.accumulation"
BUFFER: Final = "_grad.accumulation.buffer"
ACCUMULATED: Final = "_grad.accumulation.out"

# Input of the training model: whether a step begins a new accumulation.
RESET: Final = "lazy_reset_grad"

# State of the training graph: the number of steps so far.
STEP_COUNTER: Final = "quantization_step"

NEWEST_IR_VERSION: Final = 10
