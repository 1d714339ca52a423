"""Random inputs for a model that comes without samples: better than no range, and no calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.calibration.npz import Batch, static_size
from rewriter.operators import is_constant

_COUNT: Final = 4
_SEED: Final = 0

# Sizes of dynamic dimensions: of the spatial dimensions of an image, and of any other (a sequence).
_SPATIAL_SIZE: Final = 224
_OTHER_SIZE: Final = 32


class RandomSamples:
    """A few seeded samples: floats are standard normal, indices of a table uniform, other integers 1."""

    def __init__(self, inputs: Sequence[ir.Value]) -> None:
        self._inputs = inputs

    def __len__(self) -> int:
        return _COUNT

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """One sample at a time (or the batch that the inputs prescribe): `batch_size` is an upper bound."""
        generator = np.random.default_rng(_SEED)
        for _ in range(_COUNT):
            yield {value.name or "": _random(value, generator) for value in self._inputs}


def _random(value: ir.Value, generator: np.random.Generator) -> npt.NDArray[Any]:
    dimensions = value.shape or ir.Shape([1])
    rank = len(dimensions)
    shape = [
        static_size(size) or (1 if axis == 0 else _SPATIAL_SIZE if rank == 4 and axis >= 2 else _OTHER_SIZE)
        for axis, size in enumerate(dimensions)
    ]
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    rows = _table_rows(value)
    if dtype.kind in "iu" and rows is not None:
        return generator.integers(0, rows, shape).astype(dtype)
    if dtype.kind in "iub":
        return np.ones(shape, dtype)
    return generator.standard_normal(shape).astype(dtype)


def _table_rows(value: ir.Value) -> int | None:
    """Rows of the smallest constant table that the input indexes; None if it indexes none."""
    rows = []
    for use in value.uses():
        table = use.node.inputs[0] if use.node.op_type == "Gather" and use.idx == 1 else None
        if table is not None and is_constant(table) and table.shape is not None:
            rows.append(table.shape.numpy()[use.node.attributes.get_int("axis", 0)])
    return min(rows, default=None)
