"""Brings a loaded model into the one form that the rest of the rewriter works on."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
)

from rewriter.errors import ErrorCode, QatError
from rewriter.normalize.activations import FuseHardSwishPass
from rewriter.normalize.auto_pad import ExplicitPadsPass
from rewriter.normalize.batch import DynamicBatchPass
from rewriter.normalize.bias import FuseBiasPass
from rewriter.normalize.constants import FoldConstantsPass
from rewriter.normalize.elimination import EliminateNodesPass
from rewriter.normalize.limits import BoundTensorsPass
from rewriter.normalize.opset import OPSET, ConvertOpsetPass
from rewriter.normalize.parameters import check_parameters
from rewriter.normalize.quantize_pairs import RaiseQuantizePairs
from rewriter.normalize.shapes import CleanShapesPass, InferShapesPass
from rewriter.normalize.training_mode import training_mode_warnings


@dataclasses.dataclass(frozen=True)
class NormalizationReport:
    """What normalization did that the owner of the model may want to know.

    Attributes:
        source_opset: opset the model came in; it is in `opset` now.
        changed: names of the passes that changed something, in order.
        dynamic_batch: graph inputs whose first dimension was 1 and is now "batch".
        warnings: sentences for the manifest.
    """

    source_opset: int
    opset: int
    changed: tuple[str, ...]
    dynamic_batch: tuple[str, ...]
    warnings: tuple[str, ...]


def normalize(model: ir.Model) -> NormalizationReport:
    """Rewrite `model` in place; it computes the same.

    Afterwards: opset 18, IR version 8 to 10, unique names, constants are initializers and initializers are
    not inputs, explicit pads, biases and HardSwish are where they belong, the batch is dynamic where that
    is possible, shapes are inferred.

    Raises:
        QatError: model_opset_unsupported, model_unsupported, model_no_float_weights, model_too_large,
            model_invalid (see `check_parameters`).
    """
    source_opset = model.opset_imports.get("", OPSET)
    constants, batch = FoldConstantsPass(), DynamicBatchPass()
    passes: tuple[ir.passes.InPlacePass, ...] = (
        RemoveInitializersFromInputsPass(),
        NameFixPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        CleanShapesPass(),
        BoundTensorsPass(),
        InferShapesPass(),
        ConvertOpsetPass(),
        constants,
        RemoveUnusedNodesPass(),
        EliminateNodesPass(),
        InferShapesPass(),
        ExplicitPadsPass(),
        FuseBiasPass(),
        FuseHardSwishPass(),
        NameFixPass(),
        batch,
        InferShapesPass(),
        # From here on the graph holds FakeQuantize nodes, which onnxruntime and onnx do not know.
        RaiseQuantizePairs(),
        RemoveUnusedNodesPass(),
        NameFixPass(),
    )
    changed = [type(each).__name__ for each in passes if each(model).modified]
    _require_float_weights(model.graph)
    check_parameters(model.graph)
    return NormalizationReport(
        source_opset=source_opset,
        opset=OPSET,
        changed=tuple(dict.fromkeys(changed)),
        dynamic_batch=batch.inputs,
        warnings=(*constants.warnings, *batch.warnings, *training_mode_warnings(model)),
    )


def _require_float_weights(graph: ir.Graph) -> None:
    dtypes = set()
    for value in graph.initializers.values():
        if value.shape is not None and len(value.shape) >= 1 and value.dtype is not None and value.uses():
            dtypes.add(value.dtype)
    if ir.DataType.FLOAT in dtypes:
        return
    hint = "there is nothing to train in it"
    if next(iter(graph.subgraphs()), None) is not None:
        hint = "what stands inside If, Loop and Scan is not trained"
    if dtypes & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}:
        hint = "its weights have another floating-point type; convert them to float32"
    raise QatError(ErrorCode.MODEL_NO_FLOAT_WEIGHTS, f"The model has no float32 weights: {hint}.")
