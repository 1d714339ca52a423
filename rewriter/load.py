"""Reads an ONNX file into the graph representation, and writes one back.

A model is hostile input: everything that is cheap to check is checked here, before any native code runs the
graph. Parsing and checking themselves call native code (protobuf, onnx.checker), so that a service calls
`load` in a process that it can afford to lose.
"""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Final

import google.protobuf.message  # type: ignore[import-untyped]
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from rewriter.declared_shapes import drop_false_shapes
from rewriter.errors import ErrorCode, QatError
from rewriter.model_checks import LoadLimits, all_nodes, check_contents

__all__ = ["LoadLimits", "external_data_files", "load", "load_from_bundle", "save"]

# protobuf cannot serialize a message of 2 GiB; the margin is for the graph around the weights.
EXTERNAL_DATA_THRESHOLD: Final = int(1.8 * 2**30)

# Key in the metadata of a loaded model: a value whose declared shape is false, so that none was taken over.
FALSE_SHAPE: Final = "false_shape"

_DEFAULT_LIMITS: Final = LoadLimits()


def load(path: str | os.PathLike[str], *, limits: LoadLimits = _DEFAULT_LIMITS) -> ir.Model:
    """The model at `path`, checked, with model-local functions inlined.

    External data stays on disk and is memory-mapped when it is read.

    Raises:
        QatError: model_not_found, model_not_onnx, model_too_large, model_invalid, model_domain_unknown,
            model_opset_unsupported, external_data_outside, external_data_missing.
    """
    path = pathlib.Path(path)
    try:
        proto = _parse(path, limits)
        check_contents(proto, path.parent, limits)
        _check_graph(proto)
        false_shape = drop_false_shapes(proto)
        model = _deserialize(proto, path.parent)
        if false_shape is not None:
            model.meta[FALSE_SHAPE] = false_shape
        return model
    except QatError as error:
        error.file = error.file or path.name
        raise


def load_from_bundle(path: pathlib.Path) -> ir.Model:
    """A model that `prepare` wrote.

    Raises:
        QatError: bundle_invalid, it is damaged.
    """
    try:
        return load(path)
    except QatError as error:
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            f"{path.name} is damaged, prepare the bundle again: {error.message}",
            node=error.node,
            file=path.name,
        ) from error


def external_data_files(model: ir.Model) -> list[str]:
    """Files that tensors of a loaded model lie in, sorted; paths relative to the model's folder."""
    return sorted({str(t.location) for t in _tensors(model) if isinstance(t, ir.ExternalTensor)})


def save(model: ir.Model, path: pathlib.Path) -> list[pathlib.Path]:
    """Write `model` to `path`; returns the files written, `path` first.

    Weights of more than `EXTERNAL_DATA_THRESHOLD` bytes together go to `{path}.data` beside it. A failure may
    leave half a file behind: write into a place of its own (`rewriter.bundle.new_file`).

    Raises:
        OSError: the files cannot be written.
    """
    weight_bytes = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    if weight_bytes > EXTERNAL_DATA_THRESHOLD:
        data = path.with_name(f"{path.name}.data")
        ir.save(model, path, external_data=data.name)
        return [path, data]
    path.write_bytes(ir.to_proto(_with_embedded_weights(model)).SerializeToString(deterministic=True))
    return [path]


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The initializers and the tensor attributes of the model and its subgraphs."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _with_embedded_weights(model: ir.Model) -> ir.Model:
    """`model` itself, or a clone whose external tensors are embedded; the caller's model is not touched."""
    external = [
        (graph, name)
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    if not external:
        return model
    return ir.external_data.load_to_model(model.clone())


def _parse(path: pathlib.Path, limits: LoadLimits) -> onnx.ModelProto:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise QatError(ErrorCode.MODEL_NOT_FOUND, "There is no such model file.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise QatError(ErrorCode.MODEL_NOT_FOUND, f"The model file cannot be read: {reason}.") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or the like"
        raise QatError(ErrorCode.MODEL_NOT_FOUND, f"This is {what}, not a model file.")
    size = status.st_size
    if size > limits.file_bytes:
        raise QatError(
            ErrorCode.MODEL_TOO_LARGE,
            f"The file has {size} bytes, more than the {limits.file_bytes} allowed; "
            "save large weights as external data.",
        )
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise QatError(
            ErrorCode.MODEL_NOT_FOUND, f"The model file cannot be read: {error.strerror}."
        ) from error
    except google.protobuf.message.DecodeError as error:
        raise QatError(
            ErrorCode.MODEL_NOT_ONNX, "The file is not an ONNX model, or it is cut short."
        ) from error
    if proto.ir_version <= 0 or not proto.HasField("graph"):
        raise QatError(ErrorCode.MODEL_NOT_ONNX, "The file holds no ONNX graph.")
    return proto


def _check_graph(proto: onnx.ModelProto) -> None:
    """onnx.checker on everything but the initializers' data, which would be copied and may be external."""
    stripped = onnx.ModelProto(ir_version=proto.ir_version)
    stripped.opset_import.extend(proto.opset_import)
    stripped.functions.extend(proto.functions)
    graph = stripped.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    declared = {value.name for value in proto.graph.input}
    seen: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in seen:
            raise QatError(ErrorCode.MODEL_INVALID, f"There are two initializers {tensor.name!r}.")
        seen.add(tensor.name)
        if tensor.name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _drop_external_tensors(graph)
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            # The checker asks for a shape; a value of unknown rank has none, and runs all the same.
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(stripped)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise QatError(ErrorCode.MODEL_INVALID, f"The graph is not valid ONNX: {reason}") from error
    produced = seen | declared | {name for node in proto.graph.node for name in node.output}
    for output in proto.graph.output:
        if output.name not in produced:
            raise QatError(
                ErrorCode.MODEL_INVALID, f"Graph output {output.name!r} is not computed by any node."
            )


def _drop_external_tensors(graph: onnx.GraphProto) -> None:
    """Empty the external tensors of attributes and subgraphs: the checker cannot find their files."""
    for node in all_nodes(graph.node):
        for attribute in node.attribute:
            tensors = [attribute.t] if attribute.HasField("t") else []
            if attribute.HasField("g"):
                tensors.extend(attribute.g.initializer)
            for tensor in (*tensors, *attribute.tensors):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    name, data_type = tensor.name, tensor.data_type
                    tensor.Clear()
                    tensor.name, tensor.data_type, tensor.raw_data = name, data_type, b""
                    tensor.dims.append(0)


def _deserialize(proto: onnx.ModelProto, folder: pathlib.Path) -> ir.Model:
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, folder.resolve())
        version = model.opset_imports.pop("ai.onnx", None)
        if version is not None:
            model.opset_imports.setdefault("", version)
        if model.functions:
            InlinePass()(model)
            # Functions that nothing calls are left over.
            model.functions.clear()
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise QatError(ErrorCode.MODEL_INVALID, f"The graph cannot be read: {reason}") from error
    return model
