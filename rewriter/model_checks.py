"""Checks what is in a model file before anything is done with it: counts, sizes, paths, operators.

A model is hostile input; these checks are plain Python on the parsed protobuf.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import google.protobuf.message  # type: ignore[import-untyped]
import onnx
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError

DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


@dataclasses.dataclass(frozen=True)
class LoadLimits:
    """Bounds on what is accepted.

    Attributes:
        file_bytes: size of the model file (protobuf cannot parse more than 2 GiB).
        weight_bytes: bytes of all tensors together, external data included.
        messages: protobuf messages of all kinds; an empty one takes 2 bytes in the file and 100 in memory.
        nodes: nodes of the graph, its subgraphs and its functions, after the functions are inlined.
        tensors: initializers and tensor attributes.
        rank: dimensions of a tensor.
        nesting: depth of subgraphs (If, Loop, Scan) in each other.
    """

    file_bytes: int = 2**31 - 1
    weight_bytes: int = 32 * 2**30
    messages: int = 2_000_000
    nodes: int = 100_000
    tensors: int = 100_000
    rank: int = 32
    nesting: int = 8


def check_contents(proto: onnx.ModelProto, folder: pathlib.Path, limits: LoadLimits) -> None:
    """Raise at the first thing in the model that is not accepted.

    Args:
        folder: where the model file lies; external data must lie there too.

    Raises:
        QatError: model_too_large, model_invalid, model_domain_unknown, model_opset_unsupported,
            external_data_outside, external_data_missing.
    """
    _check_messages(proto, limits.messages)
    _Contents(proto, folder, limits).check()


def _check_messages(message: google.protobuf.message.Message, allowed: int) -> int:
    """Raise if there are too many messages, or a string in one of them is not text.

    Protobuf hands out as bytes what is not text.

    Returns:
        How many messages are still allowed.
    """
    allowed -= 1
    if allowed < 0:
        raise QatError(
            ErrorCode.MODEL_TOO_LARGE,
            "The model has more parts (nodes, attributes, shapes and so on) than are allowed.",
        )
    if isinstance(message, onnx.TensorProto):
        # Not over all fields: that would copy the weights.
        strings: list[Any] = [message.name, message.doc_string]
        messages: list[Any] = list(message.external_data)
    else:
        strings, messages = [], []
        for field, value in message.ListFields():
            values = [value] if isinstance(value, str | bytes | google.protobuf.message.Message) else value
            if field.type == field.TYPE_STRING:
                strings.extend(values)
            elif field.type == field.TYPE_MESSAGE:
                messages.extend(values)
    if not all(isinstance(string, str) for string in strings):
        raise QatError(ErrorCode.MODEL_INVALID, "A name or another string in the model is not UTF-8 text.")
    for inner in messages:
        allowed = _check_messages(inner, allowed)
    return allowed


class _Contents:
    """Walks over everything in a model file, counts it, and raises at the first thing not accepted."""

    def __init__(self, proto: onnx.ModelProto, folder: pathlib.Path, limits: LoadLimits) -> None:
        self._proto = proto
        self._folder = folder.resolve()
        self._limits = limits
        self._functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
        self._nodes = 0
        self._tensors = 0
        self._weight_bytes = 0
        self._external_file_bytes: dict[str, int] = {}

    def check(self) -> None:
        opsets = _opsets(self._proto.opset_import)
        if not self._proto.graph.node:
            raise QatError(ErrorCode.MODEL_INVALID, "The graph has no nodes.")
        self._check_graph(self._proto.graph, opsets, depth=0)
        for function in self._proto.functions:
            function_opsets = {**opsets, **_opsets(function.opset_import)}
            for node in function.node:
                self._check_node(node, function_opsets, depth=0)
        inlined = _nodes_when_inlined(self._proto, self._functions)
        self._bound("nodes", max(inlined, self._nodes), self._limits.nodes)

    def _bound(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise QatError(
                ErrorCode.MODEL_TOO_LARGE, f"The model has more {what} ({count}) than the {limit} allowed."
            )

    def _check_graph(self, graph: onnx.GraphProto, opsets: Mapping[str, int], depth: int) -> None:
        if depth > self._limits.nesting:
            raise QatError(
                ErrorCode.MODEL_TOO_LARGE,
                f"Subgraphs are nested deeper than the {self._limits.nesting} levels allowed.",
            )
        if graph.sparse_initializer:
            raise QatError(
                ErrorCode.MODEL_INVALID, "Sparse initializers are not supported; store the weights densely."
            )
        for tensor in graph.initializer:
            if not tensor.name:
                raise QatError(ErrorCode.MODEL_INVALID, "An initializer has no name.")
            self._check_tensor(tensor)
        for node in graph.node:
            self._check_node(node, opsets, depth)

    def _check_node(self, node: onnx.NodeProto, opsets: Mapping[str, int], depth: int) -> None:
        self._nodes += 1
        self._bound("nodes", self._nodes, self._limits.nodes)
        if (node.domain, node.op_type, node.overload) not in self._functions:
            _check_operator(node, opsets)
        for attribute in node.attribute:
            try:
                for tensor in (attribute.t, *attribute.tensors) if _holds_tensors(attribute) else ():
                    self._check_tensor(tensor)
            except QatError as error:
                error.node = error.node or _label(node)
                raise
            if attribute.HasField("g"):
                self._check_graph(attribute.g, opsets, depth + 1)
            for graph in attribute.graphs:
                self._check_graph(graph, opsets, depth + 1)

    def _check_tensor(self, tensor: onnx.TensorProto) -> None:
        self._tensors += 1
        self._bound("tensors", self._tensors, self._limits.tensors)
        self._bound("dimensions in a tensor", len(tensor.dims), self._limits.rank)
        if any(dim < 0 for dim in tensor.dims):
            raise QatError(ErrorCode.MODEL_INVALID, f"Tensor {tensor.name!r} has a negative dimension.")
        try:
            dtype = ir.DataType(tensor.data_type)
            elements = math.prod(tensor.dims)
            nbytes = 0 if dtype == ir.DataType.STRING else math.ceil(elements * dtype.bitwidth / 8)
        except (ValueError, TypeError) as error:
            raise QatError(
                ErrorCode.MODEL_INVALID, f"Tensor {tensor.name!r} has no known element type."
            ) from error
        self._weight_bytes += nbytes
        self._bound("bytes of weights", self._weight_bytes, self._limits.weight_bytes)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            self._check_external(tensor, nbytes)
        elif not _has_data(tensor, dtype, elements, nbytes):
            raise QatError(
                ErrorCode.MODEL_INVALID,
                f"Tensor {tensor.name!r} does not hold as much data as its shape {list(tensor.dims)} says.",
            )

    def _check_external(self, tensor: onnx.TensorProto, nbytes: int) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or nbytes)
        except ValueError as error:
            raise QatError(
                ErrorCode.MODEL_INVALID, f"The external data of tensor {tensor.name!r} has no valid range."
            ) from error
        if offset < 0 or length < nbytes:
            raise QatError(
                ErrorCode.MODEL_INVALID, f"The external data of tensor {tensor.name!r} has no valid range."
            )
        if location not in self._external_file_bytes:
            self._external_file_bytes[location] = _external_file_bytes(self._folder, location, tensor.name)
        if offset + length > self._external_file_bytes[location]:
            raise QatError(
                ErrorCode.EXTERNAL_DATA_MISSING,
                f"The external data of tensor {tensor.name!r} ends after its file.",
                file=location,
            )


def _external_file_bytes(folder: pathlib.Path, location: str, tensor: str) -> int:
    """Size of an external-data file, which must be a file of its own in the model's folder."""
    relative = pathlib.PurePosixPath(location)
    outside = QatError(
        ErrorCode.EXTERNAL_DATA_OUTSIDE,
        f"The external data of tensor {tensor!r} lies outside the model's folder; put it beside the model.",
        file=location,
    )
    if not location or "\0" in location or "\\" in location:
        raise outside
    if relative.is_absolute() or ".." in relative.parts:
        raise outside
    try:
        file = (folder / relative).resolve()
    except (OSError, RuntimeError) as error:
        raise outside from error
    if not file.is_relative_to(folder):
        raise outside
    if not file.is_file():
        raise QatError(
            ErrorCode.EXTERNAL_DATA_MISSING,
            f"The external data of tensor {tensor!r} is missing; upload it with the model.",
            file=location,
        )
    status = file.stat()
    # A second hard link could be a file from anywhere; onnx-ir refuses to map such a file too.
    if status.st_nlink > 1:
        raise outside
    return status.st_size


def _holds_tensors(attribute: onnx.AttributeProto) -> bool:
    return attribute.HasField("t") or bool(attribute.tensors)


# Fields other than raw_data that hold elements, and how many entries an element takes.
_TYPED_FIELDS: Final[Mapping[str, tuple[ir.DataType, ...]]] = {
    "float_data": (ir.DataType.FLOAT, ir.DataType.COMPLEX64),
    "double_data": (ir.DataType.DOUBLE, ir.DataType.COMPLEX128),
    "int64_data": (ir.DataType.INT64,),
    "uint64_data": (ir.DataType.UINT32, ir.DataType.UINT64),
    "string_data": (ir.DataType.STRING,),
}


def _has_data(tensor: onnx.TensorProto, dtype: ir.DataType, elements: int, nbytes: int) -> bool:
    if tensor.HasField("raw_data"):
        return dtype != ir.DataType.STRING and len(tensor.raw_data) == nbytes
    field = next((name for name, dtypes in _TYPED_FIELDS.items() if dtype in dtypes), "int32_data")
    entries = elements
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        entries = 2 * elements
    elif dtype != ir.DataType.STRING and dtype.bitwidth < 8:
        entries = nbytes
    return len(getattr(tensor, field)) == entries


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    opsets = {entry.domain: entry.version for entry in imports}
    if "ai.onnx" in opsets:
        opsets.setdefault("", opsets["ai.onnx"])
    newest = onnx.defs.onnx_opset_version()
    if opsets.get("", 1) > newest or opsets.get("", 1) < 1:
        raise QatError(
            ErrorCode.MODEL_OPSET_UNSUPPORTED,
            f"The model uses opset {opsets['']}; the newest known is {newest}.",
        )
    return opsets


def _label(node: onnx.NodeProto) -> str:
    """The node's name, or where it has none what tells it apart."""
    return node.name or f"{node.op_type} -> {', '.join(node.output)}"


def _check_operator(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    if node.domain not in DOMAINS:
        raise QatError(
            ErrorCode.MODEL_DOMAIN_UNKNOWN,
            f"Operator {node.op_type} is of the operator set {node.domain!r}, which is not known here; "
            "export the model with standard ONNX operators.",
            node=_label(node),
        )
    if node.domain not in ("", "ai.onnx"):
        return
    version = opsets.get("")
    if version is None:
        raise QatError(ErrorCode.MODEL_INVALID, "The model does not say which ONNX opset it uses.")
    try:
        onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain="")
    except onnx.defs.SchemaError as error:
        raise QatError(
            ErrorCode.MODEL_INVALID,
            f"There is no operator {node.op_type} in ONNX opset {version}.",
            node=_label(node),
        ) from error


FunctionId = tuple[str, str, str]


def _nodes_when_inlined(proto: onnx.ModelProto, functions: Mapping[FunctionId, onnx.FunctionProto]) -> int:
    """Nodes of the main graph after inlining; functions that call functions can multiply without bound."""
    sizes: dict[FunctionId, int] = {}
    in_progress: set[FunctionId] = set()

    def size_of(node: onnx.NodeProto) -> int:
        key = (node.domain, node.op_type, node.overload)
        if key not in functions:
            return 1
        if key in in_progress or len(in_progress) > _MAX_CALL_DEPTH:
            raise QatError(
                ErrorCode.MODEL_INVALID,
                f"Function {node.op_type} calls itself, or functions call each other too deeply.",
                node=_label(node),
            )
        if key not in sizes:
            in_progress.add(key)
            sizes[key] = sum(size_of(inner) for inner in all_nodes(functions[key].node))
            in_progress.discard(key)
        return sizes[key]

    return sum(size_of(node) for node in all_nodes(proto.graph.node))


_MAX_CALL_DEPTH: Final = 100


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and the nodes of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from all_nodes(graph.node)
