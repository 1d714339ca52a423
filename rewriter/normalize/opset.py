"""Brings a model to the working opset, 18, with its meaning kept.

ONNX operators change over opset versions: most changes only add element types or optional attributes and
need nothing. Those that change what a node means or how it is written are in two tables, keyed by operator
type and the version that changed it: `opset_upgrades` and `opset_downgrades`. What remains is checked
against the operator's definition in opset 18.

onnx.version_converter is not used: it converts upwards only, loses large weights and names on the way,
leaves subgraphs alone, and is native code run on an unchecked graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.names import FreeNames
from rewriter.normalize.adapters import Adapter
from rewriter.normalize.opset_downgrades import DOWNGRADES
from rewriter.normalize.opset_upgrades import SOFTMAX_FAMILY, UPGRADES
from rewriter.normalize.shapes import InferShapesPass

OPSET: Final = 18
MIN_IR_VERSION: Final = 8  # the first that knows opset 18
MAX_IR_VERSION: Final = 10  # the last that onnxruntime 1.19 reads


class ConvertOpsetPass(ir.passes.InPlacePass):
    """Converts every node of the default domain to opset 18.

    1. A node whose operator is the same in both opsets stays as it is.
    2. A node in the tables goes through each change between the two opsets in turn. An adapter may replace
       the node by others that are valid in opset 18; then it is done.
    3. Every node must then be one that opset 18 defines: known attributes, a possible number of inputs,
       and input types that opset 18 has. Else: model_opset_unsupported, naming the node.

    The IR version is brought into [8, 10]. Subgraphs are converted too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        source = model.opset_imports.get("", OPSET)
        names = FreeNames(model)
        modified = source != OPSET or not MIN_IR_VERSION <= model.ir_version <= MAX_IR_VERSION
        nodes = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain == ""]
        postponed = dict.fromkeys(node for node in nodes if _needs_rank(node, source))
        if source != OPSET:
            for node in nodes:
                if node not in postponed:
                    _convert(node, source, names)
        model.opset_imports[""] = OPSET
        if postponed:
            # Newer operators tell more about shapes.
            InferShapesPass()(model)
            for node in postponed:
                _convert(node, source, names)
        for subgraph in model.graph.subgraphs():
            subgraph.opset_imports.pop("", None)
        model.ir_version = min(max(model.ir_version, MIN_IR_VERSION), MAX_IR_VERSION)
        return ir.passes.PassResult(model, modified)


def _needs_rank(node: ir.Node, source: int) -> bool:
    """Whether the node's rank decides how it is converted, and is not known."""
    x = node.inputs[0] if node.inputs else None
    return source < 13 and node.op_type in SOFTMAX_FAMILY and x is not None and x.shape is None


def _convert(node: ir.Node, source: int, names: FreeNames) -> None:
    versions: range
    table: Mapping[tuple[str, int], Adapter]
    if source < OPSET:
        versions, table = range(source + 1, OPSET + 1), UPGRADES
    else:
        versions, table = range(source, OPSET, -1), DOWNGRADES
    converted: ir.Node | None = node
    for version in versions:
        adapter = table.get((node.op_type, version))
        if adapter is not None:
            converted = adapter(node, names)
            if converted is None:
                return
    _check(node, source)


def _check(node: ir.Node, source: int) -> None:
    """Raise unless opset 18 defines `node` as it stands."""
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=OPSET, domain="")
    except onnx.defs.SchemaError as error:
        raise _unsupported(node, source, "there is no such operator in opset 18") from error
    if schema.deprecated:
        raise _unsupported(node, source, "the operator was removed")
    for attribute in node.attributes:
        if attribute not in schema.attributes:
            raise _unsupported(node, source, f"opset 18 has no attribute {attribute!r} for it")
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        raise _unsupported(node, source, f"opset 18 does not define it with {len(node.inputs)} inputs")
    for index, value in enumerate(node.inputs):
        if value is None or not isinstance(value.type, ir.TensorType):
            continue
        types = schema.inputs[min(index, len(schema.inputs) - 1)].types
        dtype = _type_string(value.type.dtype)
        if types and dtype not in types:
            raise _unsupported(node, source, f"opset 18 does not define it for {dtype}")


def _type_string(dtype: ir.DataType) -> str:
    return f"tensor({onnx.TensorProto.DataType.Name(dtype.value).lower()})"


def _unsupported(node: ir.Node, source: int, reason: str) -> QatError:
    return QatError(
        ErrorCode.MODEL_OPSET_UNSUPPORTED,
        f"{node.op_type} of opset {source} cannot be written in opset {OPSET}: {reason}; "
        f"export the model with opset {OPSET}.",
        node=node.name,
    )
