"""Gradient cases of matrix products, convolutions, pooling and normalization."""

from __future__ import annotations

import numpy as np
from gradient_check import SHAPES, Case
from gradient_values import normal, positive, scalar, spread

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
    Case("LayerNormalization_matrix", "LayerNormalization", [normal(3, 4), normal(1, 4), normal(1, 4)]),
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
