"""Every gradient rule emits nodes that stay on the GPU under CUDA, whatever is known of the shapes."""

from __future__ import annotations

import pathlib

import pytest
from gradient_cases import CASES
from gradient_check import Case, forward_model, with_gradients

from tests.rewriter.cuda_placement import as_run, placement

_PADDING = "CUDA's ConvTranspose wants symmetric padding"
_FED = "the repeats are fed, so that arithmetic with them is done on the GPU"
EXCUSED = {
    "Celu": "the operator has no CUDA kernel",
    "Mean_2": "the operator has no CUDA kernel",
    "ConvTranspose_2d_output_padding": _PADDING,
    "ConvTranspose_1d_grouped": _PADDING,
    "CrossEntropy_int32": "CUDA's cross entropy wants int64 labels; ours are",
    "Tile_fed": _FED,
}


@pytest.mark.parametrize(
    ("case", "shapes"), [pytest.param(c, s, id=f"{c}-{s}") for c in CASES for s in c.shapes]
)
def test_gradient_stays_on_the_gpu(case: Case, shapes: str, tmp_path: pathlib.Path) -> None:
    model = with_gradients(forward_model(case, shapes), [f"i{i}" for i in case.wrt])
    found = placement(as_run(model.SerializeToString(), tmp_path))
    strays = (found.without_kernel, found.to_host, found.to_device)
    assert (strays != ((), (), ())) == (case.name in EXCUSED), strays
