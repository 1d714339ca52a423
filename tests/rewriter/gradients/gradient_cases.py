"""Every operator with a rule, in the forms that its rule tells apart."""

from __future__ import annotations

from gradient_cases_elementwise import ACTIVATION, ELEMENTWISE
from gradient_cases_layers import CONVOLUTION, LINEAR, NORMALIZATION, POOLING
from gradient_cases_loss import LOSS
from gradient_cases_movement import MOVEMENT, REDUCTION

CASES = [
    *ELEMENTWISE,
    *ACTIVATION,
    *LINEAR,
    *CONVOLUTION,
    *POOLING,
    *NORMALIZATION,
    *MOVEMENT,
    *REDUCTION,
    *LOSS,
]
