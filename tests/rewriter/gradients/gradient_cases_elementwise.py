"""Gradient cases of elementwise arithmetic and the activations."""

from __future__ import annotations

import numpy as np
from gradient_check import SHAPES, Case
from gradient_values import RNG, normal, positive, scalar, spread
from onnx import TensorProto

# Shapes of two operands, every way to broadcast.
BROADCASTS = {
    "same": ((2, 3, 4), (2, 3, 4)),
    "vector": ((2, 3, 4), (4,)),
    "channel": ((2, 3, 4), (3, 1)),
    "scalar": ((2, 3, 4), ()),
    "one": ((2, 3, 4), (1,)),
    "ones": ((2, 3, 4), (1, 1, 1)),
    "left": ((3, 1), (2, 3, 4)),
    "both": ((2, 1, 4), (3, 1)),
    "scalars": ((), ()),
}

ELEMENTWISE = [
    *(
        Case(f"{op}_{form}", op, [normal(*a), positive(*b) if op == "Div" else normal(*b)], shapes=SHAPES)
        for op in ("Add", "Sub", "Mul", "Div")
        for form, (a, b) in BROADCASTS.items()
    ),
    *(Case(f"{op}_2", op, [spread(2, 3), spread(2, 3) + 0.03], shapes=SHAPES) for op in ("Max", "Min")),
    Case(
        "Max_3_broadcast",
        "Max",
        [4 * spread(2, 3), 4 * spread(3) + 0.13, 4 * spread(2, 1) - 0.13],
        shapes=SHAPES,
    ),
    Case("Min_1", "Min", [normal(2, 3)]),
    Case("Sum_3", "Sum", [normal(2, 3), normal(3), normal(2, 1)], shapes=SHAPES),
    Case("Mean_2", "Mean", [normal(2, 3), normal(3)], shapes=SHAPES),
    Case("Where", "Where", [RNG.random((2, 3)) > 0.5, normal(2, 3), normal(2, 3)], shapes=SHAPES),
    Case("Where_scalar", "Where", [RNG.random((2, 3)) > 0.5, normal(2, 3), normal()], shapes=SHAPES),
    Case("Where_condition", "Where", [RNG.random((2, 1)) > 0.5, normal(3), normal(2, 3)], shapes=SHAPES),
    Case("Pow_2", "Pow", [normal(2, 3), scalar(2)], constants=(1,)),
    Case("Pow_half", "Pow", [positive(2, 3), scalar(0.5)], constants=(1,)),
    Case("Pow_integer", "Pow", [normal(2, 3), np.array(3, np.int64)], constants=(1,)),
    Case("Pow_0", "Pow", [np.zeros((2, 3), np.float32), scalar(0)], constants=(1,)),
    Case("Pow_vector", "Pow", [positive(2, 1), np.array([1, 2.5, 0], np.float32)], constants=(1,)),
    Case("Pow_fed", "Pow", [positive(2, 3), scalar(2.5)], differentiated=(0,), shapes=SHAPES),
    *(Case(op, op, [normal(2, 3)]) for op in ("Identity", "Neg", "Exp", "Erf", "Sin", "Cos")),
    *(Case(op, op, [positive(2, 3)]) for op in ("Sqrt", "Log", "Reciprocal")),
    Case("Abs", "Abs", [spread(2, 3)]),
    Case("Cast_float", "Cast", [normal(2, 3)], {"to": TensorProto.FLOAT}),
]

ACTIVATION = [
    Case("Relu", "Relu", [spread(4, 6)], shapes=SHAPES),
    Case("LeakyRelu", "LeakyRelu", [spread(4, 6)], {"alpha": 0.2}),
    Case("LeakyRelu_default", "LeakyRelu", [spread(4, 6)]),
    Case("Clip", "Clip", [spread(4, 6), scalar(-0.5), scalar(0.6)], constants=(1, 2)),
    Case("Clip_min", "Clip", [spread(4, 6), scalar(0)], constants=(1,)),
    Case("Clip_max", "Clip", [spread(4, 6), None, scalar(0.3)], constants=(2,)),
    Case("Clip_none", "Clip", [spread(4, 6)]),
    Case("ThresholdedRelu", "ThresholdedRelu", [spread(4, 6)], {"alpha": 0.5}),
    Case("HardSigmoid", "HardSigmoid", [spread(6, 10)], {"alpha": 0.5, "beta": 0.5}),
    Case("HardSwish", "HardSwish", [spread(8, 10) * 1.5]),
    Case("Elu", "Elu", [spread(4, 6)], {"alpha": 1.3}),
    Case("Elu_default", "Elu", [spread(4, 6)]),
    Case("Selu", "Selu", [spread(4, 6)]),
    Case("Celu", "Celu", [spread(4, 6)], {"alpha": 0.7}),
    Case("PRelu_channel", "PRelu", [spread(2, 3, 4), normal(3, 1)], shapes=SHAPES),
    Case("PRelu_scalar", "PRelu", [spread(2, 3, 4), normal(1)], shapes=SHAPES),
    *(Case(op, op, [normal(3, 4)]) for op in ("Sigmoid", "Tanh", "Softplus", "Mish")),
    Case("Softsign", "Softsign", [spread(4, 6)]),
    *(
        Case(f"{op}_{axis}", op, [normal(2, 3, 4)], {} if axis is None else {"axis": axis}, shapes=SHAPES)
        for op in ("Softmax", "LogSoftmax")
        for axis in (None, -1, 1, 0)
    ),
]
