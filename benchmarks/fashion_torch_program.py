"""Writes a QAT model for `benchmarks.fashion_torch`: our quantizers, with batch norm still to be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from benchmarks.torch_program import write_torch_program
from rewriter.calibration import calibrate
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.insertion import insert
from rewriter.load import load
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.recipe import Recipe


def write_qat_program(model: Path, recipe: Recipe, calibration: Path, folder: Path) -> None:
    """Write program.json and weights.npz: the quantizers and the start that `rewriter.prepare` would make.

    Args:
        model: float ONNX file of convolutions with batch norm, and a Gemm, ending in a cross-entropy loss.
        calibration: npz of samples.
    """
    quantized = load(model)
    normalize(quantized)
    fold_batch_norms(quantized, recipe.model_copy(update={"batch_norm": "fold_inference"}))
    plan = place(quantized, recipe)
    insert(quantized, plan, calibrate(quantized, plan, recipe, calibration))
    scores = quantized.graph.outputs[0].name
    weights = {quantizer.zero_point_name for quantizer in plan.quantizers if quantizer.kind == "weight"}
    write_torch_program(quantized, recipe.loss, _gemm_parameters(quantized), folder)
    program = json.loads((folder / "program.json").read_text())
    with np.load(folder / "weights.npz") as arrays:
        values = dict(arrays.items())
    _unfold_batch_norms(program, values, onnx.load(model).graph)
    program["scores"] = scores
    program["freeze_bn_delay"] = recipe.freeze_bn_delay
    program["trained_zero_points"] = [name for name in program["zero_points"] if name not in weights]
    (folder / "program.json").write_text(json.dumps(program))
    np.savez(folder / "weights.npz", **values)


def _gemm_parameters(model: ir.Model) -> list[str]:
    """Weight and bias of every Gemm, behind their quantizers."""
    found = []
    for node in model.graph:
        if node.op_type == "Gemm":
            for value in node.inputs[1:]:
                producer = None if value is None else value.producer()
                source = value if producer is None else producer.inputs[0]
                assert source is not None
                found.append(source.name or "")
    return found


def _unfold_batch_norms(program: dict[str, Any], values: dict[str, Any], source: onnx.GraphProto) -> None:
    """Make ConvBatchNorm of each convolution with a folded batch norm, and FoldedWeight of its weight."""
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.initializer}
    convolutions = {node.output[0]: node for node in source.node if node.op_type == "Conv"}
    by_output = {node["output"]: node for node in program["nodes"]}
    for node in source.node:
        if node.op_type != "BatchNormalization":
            continue
        raw_weight = convolutions[node.input[0]].input[1]
        gamma, _, _, variance = statistics = list(node.input[1:5])
        (epsilon,) = [a.f for a in node.attribute if a.name == "epsilon"] or [1e-5]
        conv = by_output[node.input[0]]
        quantizer = by_output[conv["inputs"][1]]
        folded = {
            "op": "FoldedWeight",
            "inputs": [f"{raw_weight}.raw", gamma, variance],
            "output": quantizer["inputs"][0],
            "attributes": {"epsilon": epsilon},
        }
        program["nodes"].insert(program["nodes"].index(quantizer), folded)
        conv["op"] = "ConvBatchNorm"
        conv["inputs"] = [*conv["inputs"][:2], *statistics]
        conv["attributes"]["epsilon"] = epsilon
        values.update((name, initializers[name]) for name in statistics)
        values[f"{raw_weight}.raw"] = initializers[raw_weight]
        program["trainable"] += [f"{raw_weight}.raw", *statistics[:2]]
