"""Where onnxruntime-training's CUDA build puts the nodes and values of a model, read off its kernel table.

The rules are onnxruntime's own:

1. A node goes to the GPU if a kernel is registered for its version and element types.
2. Of these, onnxruntime itself moves to the CPU what depends only on values that are there already (sizes and
   shapes), on small constants and on graph inputs (fallback_cpu_capability.cc, GetCpuPreferredNodes).
3. Everything that a node on the CPU reads and writes is in host memory; so are some inputs and outputs of
   nodes on the GPU.
4. A value that is in one memory and read in the other is copied, every step; a constant is not, it is put in
   both at load time.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
from onnx import TensorProto, helper

_TABLE: Final = json.loads(Path(__file__).with_name("cuda_kernels.json").read_text())
_KERNELS: Final[Mapping[str, Mapping[str, Any]]] = _TABLE["kernels"]
_FUNCTIONS: Final[Mapping[str, list[str]]] = _TABLE["functions"]

_SMALL = 100  # elements of an initializer, kSmallInitializerThreshold


@dataclasses.dataclass(frozen=True)
class Stray:
    """A value, and the nodes that read it where it should not be."""

    value: str
    readers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """What does not stay on the GPU.

    Attributes:
        without_kernel: "operator node: why" of each node that falls back to the CPU.
        shape_arithmetic: nodes that onnxruntime prefers to run on the CPU, by rule 2.
        to_host: copies that wait for the GPU.
        to_device: copies of what the CPU computes, or is fed and reads too.
        numbers_on_host: values other than int64 and bool, constants aside, that are read in host memory.
    """

    without_kernel: tuple[str, ...]
    shape_arithmetic: tuple[str, ...]
    to_host: tuple[Stray, ...]
    to_device: tuple[Stray, ...]
    numbers_on_host: tuple[Stray, ...]


def as_run(model: Path | bytes, folder: Path) -> onnx.ModelProto:
    """The model after the optimizations that any session applies before it places the nodes."""
    path = folder / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(path)
    for index, node in enumerate(optimized.graph.node):
        node.name = node.name or f"unnamed_{index}"
    return optimized


def placement(model: onnx.ModelProto) -> Placement:
    """Decide for a model whose nodes have unique names and are in topological order."""
    graph = model.graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    dtypes = element_types(graph)
    reasons = {node.name: why_no_kernel(node, opsets, dtypes) for node in graph.node}
    preferred = _cpu_preferred(graph, {name for name, reason in reasons.items() if reason is None})
    on_cpu = {name for name, reason in reasons.items() if reason is not None} | preferred

    made_on: dict[str, str] = {}
    readers: defaultdict[str, dict[str, list[str]]] = defaultdict(lambda: {"host": [], "device": []})
    for node in graph.node:
        entry = _KERNELS.get(_key(node), {})
        for position, value in enumerate(node.input):
            if value:
                host = node.name in on_cpu or position in entry.get("host_inputs", ())
                readers[value]["host" if host else "device"].append(f"{node.op_type} {node.name}")
        for position, value in enumerate(node.output):
            host = node.name in on_cpu or position in entry.get("host_outputs", ())
            made_on[value] = "host" if host else "device"
    for info in graph.input:
        made_on[info.name] = "host" if readers[info.name]["host"] else "device"

    def copies(source: str, target: str) -> tuple[Stray, ...]:
        return tuple(
            Stray(value, tuple(readers[value][target]))
            for value, memory in made_on.items()
            if memory == source and readers[value][target]
        )

    return Placement(
        without_kernel=tuple(f"{n.op_type} {n.name}: {r}" for n in graph.node if (r := reasons[n.name])),
        shape_arithmetic=tuple(f"{n.op_type} {n.name}" for n in graph.node if n.name in preferred),
        to_host=copies("device", "host"),
        to_device=copies("host", "device"),
        numbers_on_host=tuple(
            Stray(value, tuple(readers[value]["host"]))
            for value in made_on
            if readers[value]["host"] and dtypes[value] not in (TensorProto.INT64, TensorProto.BOOL)
        ),
    )


def why_no_kernel(node: onnx.NodeProto, opsets: Mapping[str, int], dtypes: Mapping[str, int]) -> str | None:
    """Why the GPU cannot take a node, None where it can."""
    for op_type in _FUNCTIONS.get(_key(node), ()):
        if op_type not in _KERNELS:
            return f"its definition holds {op_type}, which has no CUDA kernel"
    if _key(node) in _FUNCTIONS:
        return None
    entry = _KERNELS.get(_key(node))
    if entry is None:
        return "the operator has no CUDA kernel"
    version = 1 if node.domain else onnx.defs.get_schema(node.op_type, opsets[""]).since_version
    if not any(_matches(versions, version) for versions in entry["versions"]):
        return f"version {version} of the operator has no CUDA kernel, only {', '.join(entry['versions'])}"
    for position, names in entry["types"].items():
        value = node.input[int(position)] if int(position) < len(node.input) else ""
        if value and dtypes.get(value) not in {_ELEMENT_TYPES[name] for name in names.split()}:
            found = TensorProto.DataType.Name(dtypes.get(value, 0)).lower()
            return f"its input {position} is {found}, and the CUDA kernel is for {names}"
    return _geometry(node)


def _geometry(node: onnx.NodeProto) -> str | None:
    """cuda_execution_provider.cc, ConvTransposeNeedFallbackToCPU; reduction_ops.cc."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "ConvTranspose" and not node.domain:
        pads = attributes.get("pads", [])
        half = len(pads) // 2
        if list(pads[:half]) != list(pads[half:]):
            return "its padding is asymmetric"
        if attributes.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
            return "its padding is automatic"
    if node.op_type == "ReduceSum" and list(node.input[1:]) == [""]:
        return "its axes are an input without a name, where the kernel fails"
    return None


def _matches(versions: str, version: int) -> bool:
    """An open range is for operators last revised at its start only."""
    if versions.endswith("+"):
        return version == int(versions[:-1])
    first, last = map(int, versions.split("-"))
    return first <= version <= last


def _cpu_preferred(graph: onnx.GraphProto, with_kernel: set[str]) -> set[str]:
    """Rule 2. One pass does, in topological order, where onnxruntime keeps a queue in that order."""
    constants = {t.name for t in graph.initializer if _size(t) <= _SMALL} | {i.name for i in graph.input}
    on_host: set[str] = set()
    preferred = set()
    for node in graph.node:
        if node.name not in with_kernel:
            continue
        entry = _KERNELS.get(_key(node), {})
        if any(value in on_host for value in node.input) and all(
            not value
            or value in constants
            or (value in on_host and position not in entry.get("host_inputs", ()))
            for position, value in enumerate(node.input)
        ):
            preferred.add(node.name)
            on_host.update(node.output)
        on_host.update(node.output[position] for position in entry.get("host_outputs", ()))
    return preferred


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


def _key(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


_ELEMENT_TYPES: Final = {
    name.lower(): number for name, number in TensorProto.DataType.items() if name != "UNDEFINED"
}
_TRUTH: Final = ("And", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Not", "Or")


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type per value; onnx does not infer beyond onnxruntime's own operators."""
    found = {t.name: t.data_type for t in graph.initializer}
    found |= {i.name: i.type.tensor_type.elem_type for i in graph.input}
    for node in graph.node:
        for output, dtype in zip(node.output, _output_types(node, found), strict=False):
            found[output] = dtype
    return found


def _output_types(node: onnx.NodeProto, found: Mapping[str, int]) -> Iterable[int]:
    inputs = [found.get(value, 0) for value in node.input]
    attributes = {a.name: a for a in node.attribute}
    first = inputs[0] if inputs else 0
    match node.op_type:
        case "Cast":
            return [attributes["to"].i]
        case "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin":
            return [TensorProto.INT64]
        case "Where" | "DequantizeLinear":
            return [inputs[1]]
        case "QuantizeLinear":
            return [inputs[2] if len(inputs) > 2 else TensorProto.UINT8]
        case "GatherGrad" | "GatherNDGrad":
            return [inputs[2]]
        case "MaxPool" | "TopK":
            return [first, TensorProto.INT64]
        case "Dropout":
            return [first, TensorProto.BOOL]
        case "InPlaceAccumulatorV2":
            return [TensorProto.BOOL, first]
        case "Group":
            return [TensorProto.BOOL]
        case "Constant":
            return [attributes["value"].t.data_type]
        case "ConstantOfShape":
            value = attributes.get("value")
            return [value.t.data_type if value else TensorProto.FLOAT]
        case op_type if op_type in _TRUTH:
            return [TensorProto.BOOL]
        case _:
            return [first] * len(node.output)
