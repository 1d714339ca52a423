"""What onnxruntime makes of a finalized model: which kernels it runs, and whether it agrees.

The reference is the trained fake-quantized model. With graph optimizations off the two differ by rounding
of the bias alone; with all optimizations on, integer kernels requantize, which may move an output by a step.
On x86 without VNNI their sums may saturate besides, which costs far more
(`rewriter.inference.NO_SATURATION`): whether they did is found by running the model without that too.
"""

from __future__ import annotations

import collections
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from rewriter import inference
from rewriter.calibration.npz import NpzSamples
from rewriter.errors import ErrorCode, QatError

# Kernels of onnxruntime that compute a layer in integers.
INTEGER_KERNELS: Final = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"}
)
FLOAT_KERNELS: Final = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
)


class Agreement(BaseModel):
    """The int8 model beside the trained fake-quantized model, on the same samples.

    Attributes:
        samples: number of samples compared.
        top1: share of positions whose largest value along the class axis (axis 1, or the last of a
            rank-3 output) is the same, all optimizations on; null for an output without classes.
        largest_difference: largest absolute difference of the first float output, optimizations off.
        step: quantization step of that output; of an output that no quantizer writes, 1/255 of the range
            of its values.
        top1_without_saturation: as `top1`, with the session option that keeps sums of integer products from
            saturating.
        saturates: whether they did without it, on these samples and the CPU that compared: the results
            differ. Where nothing saturates, both kinds of kernels give the same bits.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    samples: int
    top1: float | None
    largest_difference: float
    step: float
    # Reports of former versions have none of these.
    top1_without_saturation: float | None = None
    saturates: bool = False

    @property
    def largest_difference_in_steps(self) -> float:
        return self.largest_difference / self.step if self.step else 0.0


def count_layer_kernels(model: pathlib.Path) -> dict[str, int]:
    """Integer and float layer kernels in the graph that onnxruntime runs, all optimizations on."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = pathlib.Path(folder, "optimized.onnx")
        options = inference.session_options()
        options.optimized_model_filepath = str(optimized)
        # Beside the graph, which a protobuf of at most 2 GiB holds.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        inference.open_session(model, options)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
        counts = collections.Counter(node.op_type for node in nodes)
    return {op: n for op, n in sorted(counts.items()) if op in INTEGER_KERNELS | FLOAT_KERNELS}


def compare(
    reference: pathlib.Path, finalized: pathlib.Path, samples: NpzSamples, steps: Mapping[str, float]
) -> Agreement:
    """Run both models on all samples, in batches.

    Args:
        steps: quantization step of the outputs that a quantizer writes, by output name.
    """
    exact = inference.session_options(optimize=False)
    expected_session = inference.open_session(reference, exact)
    exact_session = inference.open_session(finalized, exact)
    session = inference.open_session(finalized)
    unsaturated_session = inference.open_session(finalized, inference.session_options(may_saturate=False))
    output = next((o for o in expected_session.get_outputs() if o.type == "tensor(float)"), None)
    if output is None:
        raise QatError(ErrorCode.RUN_FAILED, "The model has no float32 output to compare.")

    count, positions, largest, saturates = 0, 0, 0.0, False
    same, same_without_saturation = 0, 0
    low, high = np.inf, -np.inf
    for batch in samples.batches(32):
        expected, exact_result, result, unsaturated = (
            inference.run(each, [output.name], batch)[0]
            for each in (expected_session, exact_session, session, unsaturated_session)
        )
        saturates = saturates or not np.array_equal(result, unsaturated, equal_nan=True)
        count += len(next(iter(batch.values())))
        if expected.size:
            largest = max(largest, float(np.max(np.abs(expected - exact_result))))
            low, high = min(low, float(expected.min())), max(high, float(expected.max()))
        if expected.ndim >= 2:
            axis = 2 if expected.ndim == 3 else 1
            classes = expected.argmax(axis)
            positions += classes.size
            same += int((classes == result.argmax(axis)).sum())
            same_without_saturation += int((classes == unsaturated.argmax(axis)).sum())
    return Agreement(
        output=output.name,
        samples=count,
        top1=same / positions if positions else None,
        top1_without_saturation=same_without_saturation / positions if positions else None,
        saturates=saturates,
        largest_difference=largest,
        step=steps.get(output.name, (high - low) / 255 if high > low else 0.0),
    )
