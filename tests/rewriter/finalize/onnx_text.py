"""Models of the finalize tests, written as ONNX text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper


def parse(text: str, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """The model of `text` with these initializers, named nodes and inferred shapes."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
