"""Every operator with a rule, in the forms that its rule tells apart."""

from __future__ import annotations

import numpy as np
from gradient_check import SHAPES, Case
from onnx import TensorProto

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape), np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.asarray(RNG.random(shape) + 0.5, np.float32)


def spread(*shape: int) -> np.ndarray:
    """Values 0.1 apart, half of them negative, none within 0.04 of 0: no step of the check crosses a tie."""
    count = int(np.prod(shape))
    return ((RNG.permutation(count).reshape(shape) - count // 2) * 0.1 + 0.05).astype(np.float32)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def scalar(number: float) -> np.ndarray:
    return np.array(number, np.float32)


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

LINEAR = [
    *(
        Case(
            f"Gemm_{ta}{tb}_{form}",
            "Gemm",
            [normal(4, 3) if ta else normal(3, 4), normal(5, 4) if tb else normal(4, 5), *c],
            {"transA": ta, "transB": tb, "alpha": 0.5, "beta": 2.0},
            shapes=("static", "symbolic"),
        )
        for ta in (0, 1)
        for tb in (0, 1)
        for form, c in {
            "none": [],
            "N": [normal(5)],
            "1N": [normal(1, 5)],
            "MN": [normal(3, 5)],
            "M1": [normal(3, 1)],
            "scalar": [normal()],
        }.items()
    ),
    *(
        Case(f"MatMul_{form}", "MatMul", [normal(*a), normal(*b)], shapes=shapes)
        for form, a, b, shapes in [
            ("2x2", (3, 4), (4, 5), SHAPES[:3]),
            ("3x2", (2, 3, 4), (4, 5), SHAPES[:3]),
            ("4x2", (2, 2, 3, 4), (4, 5), SHAPES[:3]),
            ("3x3", (2, 3, 4), (2, 4, 5), SHAPES[:3]),
            ("2x3", (3, 4), (2, 4, 5), SHAPES[:3]),
            ("4x3", (2, 1, 3, 4), (2, 4, 5), SHAPES[:3]),
            ("4x4_broadcast", (2, 1, 3, 4), (1, 2, 4, 5), SHAPES[:3]),
            ("1x1", (4,), (4,), SHAPES[:3]),
            ("1x2", (4,), (4, 5), SHAPES[:3]),
            ("2x1", (3, 4), (4,), SHAPES[:3]),
            ("3x1", (2, 3, 4), (4,), SHAPES[:3]),
            ("1x3", (4,), (2, 4, 5), SHAPES[:3]),
            ("1x4", (4,), (2, 2, 4, 5), SHAPES[:3]),
        ]
    ),
]

CONVOLUTION = [
    Case("Conv_2d", "Conv", [normal(2, 3, 5, 4), normal(4, 3, 3, 2), normal(4)], {"pads": [1, 1, 1, 1]}),
    Case("Conv_2d_plain", "Conv", [normal(2, 3, 5, 4), normal(4, 3, 3, 2)]),
    Case("Conv_2d_1x1", "Conv", [normal(2, 3, 4, 4), normal(4, 3, 1, 1)], {"strides": [2, 2]}),
    Case(
        "Conv_2d_strided",
        "Conv",
        [normal(2, 2, 6, 7), normal(3, 2, 3, 3), normal(3)],
        {"strides": [2, 3], "pads": [1, 1, 1, 1]},
    ),
    Case(
        "Conv_2d_asymmetric",
        "Conv",
        [normal(2, 2, 6, 6), normal(3, 2, 3, 3), normal(3)],
        {"strides": [2, 2], "pads": [0, 1, 1, 0]},
    ),
    Case(
        "Conv_2d_dilated",
        "Conv",
        [normal(1, 2, 7, 7), normal(3, 2, 3, 3)],
        {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
    ),
    Case("Conv_2d_grouped", "Conv", [normal(2, 4, 5, 5), normal(6, 2, 3, 3), normal(6)], {"group": 2}),
    Case("Conv_2d_depthwise", "Conv", [normal(2, 3, 5, 5), normal(3, 1, 3, 3), normal(3)], {"group": 3}),
    Case("Conv_2d_multiplier", "Conv", [normal(1, 2, 5, 5), normal(4, 1, 3, 3)], {"group": 2}),
    Case("Conv_2d_frozen_weight", "Conv", [normal(1, 2, 5, 5), normal(3, 2, 3, 3)], constants=(1,)),
    Case(
        "Conv_2d_input_is_data",
        "Conv",
        [normal(1, 2, 5, 5), normal(3, 2, 3, 3), normal(3)],
        differentiated=(1, 2),
    ),
    Case(
        "Conv_2d_bias_only", "Conv", [normal(1, 2, 5, 5), normal(3, 2, 3, 3), normal(3)], differentiated=(2,)
    ),
    Case("Conv_1d", "Conv", [normal(2, 3, 8), normal(4, 3, 3), normal(4)], {"pads": [1, 1], "strides": [2]}),
    Case("Conv_1d_asymmetric", "Conv", [normal(2, 3, 8), normal(4, 3, 3), normal(4)], {"pads": [2, 0]}),
    Case(
        "Conv_1d_grouped",
        "Conv",
        [normal(2, 4, 9), normal(6, 2, 3), normal(6)],
        {"group": 2, "pads": [1, 1], "strides": [2], "dilations": [2]},
    ),
    Case(
        "Conv_1d_depthwise",
        "Conv",
        [normal(2, 3, 8), normal(3, 1, 3), normal(3)],
        {"group": 3, "kernel_shape": [3], "pads": [2, 0]},
    ),
    Case(
        "Conv_3d", "Conv", [normal(1, 2, 4, 4, 3), normal(2, 2, 2, 3, 2), normal(2)], {"pads": [0, 1, 0] * 2}
    ),
    Case(
        "Conv_3d_grouped",
        "Conv",
        [normal(2, 4, 4, 3, 3), normal(4, 2, 2, 2, 2), normal(4)],
        {"group": 2, "pads": [1, 0, 0, 0, 0, 1], "strides": [2, 1, 1]},
    ),
    Case("Conv_3d_depthwise", "Conv", [normal(1, 3, 3, 3, 3), normal(3, 1, 2, 2, 2)], {"group": 3}),
    Case(
        "ConvTranspose_2d",
        "ConvTranspose",
        [normal(2, 3, 3, 4), normal(3, 2, 3, 3), normal(2)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    Case("ConvTranspose_2d_plain", "ConvTranspose", [normal(1, 3, 3, 3), normal(3, 2, 2, 2)]),
    Case(
        "ConvTranspose_2d_output_padding",
        "ConvTranspose",
        [normal(2, 3, 3, 3), normal(3, 2, 3, 3), normal(2)],
        {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]},
    ),
    Case(
        "ConvTranspose_2d_grouped",
        "ConvTranspose",
        [normal(2, 4, 3, 3), normal(4, 2, 3, 3), normal(4)],
        {"group": 2, "strides": [2, 2], "dilations": [1, 2]},
    ),
    Case(
        "ConvTranspose_1d",
        "ConvTranspose",
        [normal(2, 3, 5), normal(3, 2, 3), normal(2)],
        {"strides": [2], "output_padding": [1]},
    ),
    Case(
        "ConvTranspose_1d_grouped",
        "ConvTranspose",
        [normal(2, 4, 5), normal(4, 1, 3)],
        {"group": 2, "strides": [2], "pads": [1, 0]},
    ),
    Case(
        "ConvTranspose_3d_grouped",
        "ConvTranspose",
        [normal(1, 4, 2, 3, 2), normal(4, 1, 2, 2, 2), normal(2)],
        {"group": 2, "strides": [2, 1, 1]},
    ),
    Case(
        "ConvTranspose_frozen_weight",
        "ConvTranspose",
        [normal(1, 3, 3, 3), normal(3, 2, 2, 2)],
        constants=(1,),
    ),
]

POOLING = [
    *(
        Case(
            f"{op}_{form}",
            op,
            [spread(*shape) if op == "MaxPool" else normal(*shape)],
            attributes,
            shapes=SHAPES[:3],
        )
        for op in ("MaxPool", "AveragePool")
        for form, shape, attributes in [
            ("2d", (2, 2, 6, 4), {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("2d_rest", (2, 2, 7, 5), {"kernel_shape": [2, 2], "strides": [2, 3]}),
            ("2d_overlap", (1, 2, 5, 5), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
            (
                "2d_asymmetric",
                (1, 2, 5, 5),
                {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [0, 1, 1, 0]},
            ),
            ("2d_ceil", (1, 2, 6, 5), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
            ("2d_gaps", (1, 2, 7, 7), {"kernel_shape": [2, 2], "strides": [3, 3]}),
            ("1d", (2, 2, 7), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
            ("3d", (1, 2, 4, 4, 3), {"kernel_shape": [2, 2, 2], "strides": [2, 1, 1]}),
        ]
    ),
    Case("MaxPool_dilated", "MaxPool", [spread(1, 2, 6, 6)], {"kernel_shape": [2, 2], "dilations": [2, 1]}),
    Case(
        "AveragePool_2d_include_pad",
        "AveragePool",
        [normal(1, 2, 5, 5)],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        shapes=SHAPES[:3],
    ),
    Case(
        "AveragePool_2d_ceil_pad",
        "AveragePool",
        [normal(1, 2, 6, 6)],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1},
        shapes=SHAPES[:3],
    ),
    Case(
        "AveragePool_2d_ceil_include_pad",
        "AveragePool",
        [normal(1, 2, 6, 6)],
        {
            "kernel_shape": [3, 3],
            "strides": [2, 2],
            "pads": [1, 0, 1, 1],
            "ceil_mode": 1,
            "count_include_pad": 1,
        },
        shapes=SHAPES[:3],
    ),
    Case("GlobalAveragePool", "GlobalAveragePool", [normal(2, 3, 4, 2)], shapes=SHAPES),
    Case("GlobalAveragePool_1d", "GlobalAveragePool", [normal(2, 3, 4)]),
    Case("GlobalMaxPool", "GlobalMaxPool", [spread(2, 3, 4, 2)], shapes=SHAPES),
]

NORMALIZATION = [
    Case("LayerNormalization", "LayerNormalization", [normal(2, 3, 4), normal(4), normal(4)], shapes=SHAPES),
    Case("LayerNormalization_no_bias", "LayerNormalization", [normal(2, 3, 4), normal(4)]),
    Case(
        "LayerNormalization_axis_1",
        "LayerNormalization",
        [normal(2, 3, 4), normal(3, 4), normal(3, 4)],
        {"axis": 1},
    ),
    Case(
        "LayerNormalization_axis_-2",
        "LayerNormalization",
        [normal(2, 3, 4), normal(3, 4), normal(3, 4)],
        {"axis": -2, "epsilon": 1e-3},
    ),
    Case("LayerNormalization_constant", "LayerNormalization", [normal(3, 4), normal(4)], constants=(1,)),
    *(
        Case(
            f"BatchNormalization_{len(shape)}d",
            "BatchNormalization",
            [normal(*shape), normal(3), normal(3), normal(3), positive(3)],
            {"epsilon": 1e-3},
            constants=(3, 4),
            shapes=SHAPES,
        )
        for shape in ((4, 3), (2, 3, 4), (2, 3, 4, 2))
    ),
    Case("Dropout", "Dropout", [normal(3, 4)]),
    Case(
        "Dropout_ratio", "Dropout", [normal(3, 4), scalar(0.5), np.array(False)], constants=(1, 2), outputs=2
    ),
]

MOVEMENT = [
    Case("Reshape", "Reshape", [normal(2, 3, 4), ints(0, -1)], constants=(1,), shapes=SHAPES),
    Case("Reshape_fed", "Reshape", [normal(2, 3, 4), ints(4, 6)], shapes=SHAPES),
    Case("Flatten", "Flatten", [normal(2, 3, 4)], shapes=SHAPES),
    Case("Flatten_axis_0", "Flatten", [normal(2, 3, 4)], {"axis": 0}),
    Case("Transpose", "Transpose", [normal(2, 3, 4)], {"perm": [1, 2, 0]}, shapes=SHAPES),
    Case("Transpose_reverse", "Transpose", [normal(2, 3, 4)], shapes=SHAPES),
    Case("Squeeze", "Squeeze", [normal(2, 1, 4), ints(1)], constants=(1,), shapes=SHAPES),
    Case("Squeeze_all", "Squeeze", [normal(1, 3, 1)], shapes=SHAPES),
    Case("Unsqueeze", "Unsqueeze", [normal(2, 3), ints(-1, 0)], constants=(1,), shapes=SHAPES),
    Case("Concat", "Concat", [normal(2, 3), normal(2, 1), normal(2, 4)], {"axis": 1}, shapes=SHAPES[:3]),
    Case("Concat_negative_axis", "Concat", [normal(2, 3), normal(2, 1)], {"axis": -1}, shapes=SHAPES[:3]),
    Case("Concat_one_of_two", "Concat", [normal(2, 3), normal(2, 1)], {"axis": 1}, differentiated=(1,)),
    Case("Concat_1", "Concat", [normal(2, 3)], {"axis": 1}),
    Case(
        "Split",
        "Split",
        [normal(2, 5), ints(2, 3)],
        {"axis": 1},
        constants=(1,),
        outputs=2,
        used_outputs=(0, 1),
    ),
    Case(
        "Split_unused",
        "Split",
        [normal(6, 2)],
        {"num_outputs": 3},
        outputs=3,
        used_outputs=(1,),
        shapes=SHAPES[:3],
    ),
    Case("Slice", "Slice", [normal(4, 5), ints(1), ints(3)], constants=(1, 2), shapes=SHAPES),
    Case(
        "Slice_steps",
        "Slice",
        [normal(4, 6), ints(0, 1), ints(4, 2**63 - 1), ints(0, -1), ints(2, 2)],
        constants=(1, 2, 3, 4),
    ),
    Case(
        "Slice_backwards",
        "Slice",
        [normal(4, 6), ints(-1), ints(-(2**63) + 1), ints(1), ints(-1)],
        constants=(1, 2, 3, 4),
    ),
    Case(
        "Slice_backwards_twice",
        "Slice",
        [normal(4, 6), ints(-1, 4), ints(-(2**63) + 1, 0), ints(0, 1), ints(-1, -2)],
        constants=(1, 2, 3, 4),
    ),
    Case("Slice_fed", "Slice", [normal(4, 5), ints(1), ints(3), ints(1)], shapes=SHAPES),
    Case("Gather", "Gather", [normal(5, 3), ints(1, 3, 1)], constants=(1,), shapes=SHAPES),
    Case(
        "Gather_axis_1", "Gather", [normal(2, 5, 3), np.array([[0, -1], [2, 2]])], {"axis": 1}, constants=(1,)
    ),
    Case("Gather_scalar", "Gather", [normal(2, 5), np.array(1)], {"axis": -1}, constants=(1,)),
    Case("Gather_int32", "Gather", [normal(5, 3), np.array([4, 0, 4], np.int32)]),
    Case("GatherElements", "GatherElements", [normal(3, 3), np.array([[1, 2, 0], [2, 0, 0]])], shapes=SHAPES),
    Case("GatherElements_1", "GatherElements", [normal(2, 3), np.array([[1, -1], [0, 0]])], {"axis": 1}),
    Case("Expand", "Expand", [normal(3, 1), ints(2, 3, 4)], constants=(1,), shapes=SHAPES),
    Case("Expand_fed", "Expand", [normal(3, 1), ints(2, 1, 4)], shapes=SHAPES),
    Case("Expand_none", "Expand", [normal(3, 4), ints(1, 1)], constants=(1,), shapes=SHAPES),
    Case("Tile", "Tile", [normal(2, 3), ints(2, 3)], constants=(1,), shapes=SHAPES[:3]),
    Case("Tile_fed", "Tile", [normal(2, 3), ints(1, 2)], shapes=SHAPES[:3]),
    Case("Pad", "Pad", [normal(2, 3), ints(0, 1, 2, 1)], constants=(1,), shapes=SHAPES),
    Case("Pad_value", "Pad", [normal(2, 3), ints(0, 1, 2, 1), scalar(3)], constants=(1, 2)),
    Case("Pad_crop", "Pad", [normal(3, 4), ints(-1, 1, 0, -2)], constants=(1,), shapes=SHAPES),
    Case("Pad_axes", "Pad", [normal(2, 3), ints(1, 2), None, ints(-1)], constants=(1, 3)),
    Case("DepthToSpace", "DepthToSpace", [normal(1, 8, 2, 3)], {"blocksize": 2}),
    Case("DepthToSpace_CRD", "DepthToSpace", [normal(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", "SpaceToDepth", [normal(1, 2, 4, 6)], {"blocksize": 2}),
]

REDUCTION = [
    *(
        Case(
            f"{op}_{form}",
            op,
            [spread(2, 3, 4) if op in ("ReduceMax", "ReduceMin", "ReduceL1") else normal(2, 3, 4), *axes],
            attributes,
            constants=(1,) if axes else (),
            shapes=SHAPES,
        )
        for op in (
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
        for form, axes, attributes in [
            ("all", [], {"keepdims": 0}),
            ("all_kept", [], {}),
            ("axis", [ints(1)], {"keepdims": 0}),
            ("axes_kept", [ints(-1, 0)], {"keepdims": 1}),
            ("axes", [ints(2, 0)], {"keepdims": 0}),
        ]
    ),
    Case("ReduceSum_axes_fed", "ReduceSum", [normal(2, 3, 4), ints(1)], {"keepdims": 0}, shapes=SHAPES),
    Case("ReduceSum_noop", "ReduceSum", [normal(2, 3), ints()], {"noop_with_empty_axes": 1}),
    Case("ReduceMean_noop", "ReduceMean", [normal(2, 3), ints()], {"noop_with_empty_axes": 1, "keepdims": 0}),
]

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
