"""Gradient cases of the cross-entropy loss."""

from __future__ import annotations

import numpy as np
from gradient_check import Case
from gradient_values import RNG, normal, positive

LABELS = RNG.integers(0, 4, 5)
PIXEL_LABELS = RNG.integers(0, 3, (2, 2, 3))
CROSS_ENTROPY = "SoftmaxCrossEntropyLoss"

LOSS = [
    *(
        Case(f"CrossEntropy_{reduction}", CROSS_ENTROPY, [normal(5, 4), LABELS], {"reduction": reduction})
        for reduction in ("mean", "sum", "none")
    ),
    *(
        Case(
            f"CrossEntropy_weighted_{reduction}",
            CROSS_ENTROPY,
            [normal(5, 4), LABELS, positive(4)],
            {"reduction": reduction},
            constants=(2,),
        )
        for reduction in ("mean", "sum", "none")
    ),
    *(
        Case(
            f"CrossEntropy_pixels_{reduction}",
            CROSS_ENTROPY,
            [normal(2, 3, 2, 3), PIXEL_LABELS, positive(3)],
            {"reduction": reduction, "ignore_index": 1},
            constants=(2,),
        )
        for reduction in ("mean", "sum", "none")
    ),
    Case("CrossEntropy_ignore", CROSS_ENTROPY, [normal(5, 4), LABELS], {"ignore_index": int(LABELS[0])}),
    Case("CrossEntropy_int32", CROSS_ENTROPY, [normal(5, 4), LABELS.astype(np.int32)]),
    Case("CrossEntropy_log_prob", CROSS_ENTROPY, [normal(5, 4), LABELS], outputs=2),
    Case("CrossEntropy_pixels_log_prob", CROSS_ENTROPY, [normal(2, 3, 2, 3), PIXEL_LABELS], outputs=2),
]
