"""Models written as text, and plain onnxruntime as the reference for what they compute."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort


def model(text: str, *, opset: int = 18, ir_version: int = 8) -> ir.Model:
    """The model of ONNX's textual syntax for a graph."""
    return ir.from_proto(proto(text, opset=opset, ir_version=ir_version))


def proto(text: str, *, opset: int = 18, ir_version: int = 8) -> onnx.ModelProto:
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return onnx.parser.parse_model(f"{header}\n{text}")


def run(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Any]) -> list[np.ndarray]:
    """Outputs of the model in onnxruntime, on the CPU, with nothing optimized."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    message = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(message.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def operators(model: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph))


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == op_type]
    return node


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
