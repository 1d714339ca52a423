"""Gradient cases of the operators that move or reduce elements."""

from __future__ import annotations

import numpy as np
from gradient_check import SHAPES, Case
from gradient_values import ints, normal, scalar, spread

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
    Case("ReduceMean_axes_fed", "ReduceMean", [normal(2, 3, 4), ints(0, 2)], {"keepdims": 0}, shapes=SHAPES),
    Case("ReduceMean_noop", "ReduceMean", [normal(2, 3), ints()], {"noop_with_empty_axes": 1, "keepdims": 0}),
]
