"""What the opset tables are made of: adapters, and the small steps that they share.

An adapter changes a node in place for one change of its operator, and returns it, or None when it replaced
the node by others in opset-18 form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.normalize.graphs import owning_graph

Adapter = Callable[[ir.Node, FreeNames], ir.Node | None]


def unsupported(node: ir.Node, reason: str) -> QatError:
    return QatError(
        ErrorCode.MODEL_OPSET_UNSUPPORTED,
        f"{node.op_type} cannot be converted to opset 18: {reason}.",
        node=node.name,
    )


# Steps


def pop(node: ir.Node, name: str, default: Any = None) -> Any:
    """Remove an attribute and return its value."""
    attribute = node.attributes.pop(name, None)
    return default if attribute is None else attribute.value


def constant(node: ir.Node, names: FreeNames, what: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """A new initializer beside `node`, named after its output."""
    return add_initializer(owning_graph(node), names.take(f"{node.outputs[0].name}_{what}"), array)


def number(node: ir.Node, names: FreeNames, what: str, value: float) -> ir.Value:
    """A new scalar of the type of the node's first input."""
    return constant(node, names, what, np.asarray(value, input_type(node)))


def input_type(node: ir.Node) -> np.dtype[Any]:
    """The element type of the first input, float32 where it is not known."""
    x = node.inputs[0]
    return np.dtype(np.float32) if x is None or x.dtype is None else x.dtype.numpy()


def set_input(node: ir.Node, names: FreeNames, index: int, array: npt.NDArray[np.generic], what: str) -> None:
    """Make a new initializer the input `index` of `node`, which may have fewer inputs."""
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, constant(node, names, what, array))


def insert_before(node: ir.Node, names: FreeNames, added: ir.Node) -> ir.Value:
    """Put `added` before `node`; its output."""
    _name_outputs(node, names, added)
    owning_graph(node).insert_before(node, added)
    return added.outputs[0]


def replace(node: ir.Node, names: FreeNames, replacement: list[ir.Node]) -> None:
    """Put `replacement` in the place of `node`; the last node's output takes over name, type and shape."""
    old, new = node.outputs[0], replacement[-1].outputs[0]
    for each in replacement[:-1]:
        _name_outputs(node, names, each)
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(owning_graph(node), node, [node], replacement, [old], [new])


def _name_outputs(node: ir.Node, names: FreeNames, added: ir.Node) -> None:
    # onnx-ir would name them too, but does not look at initializers and subgraphs.
    for output in added.outputs:
        output.name = names.take(f"{node.outputs[0].name}_{added.op_type}")


# Adapters


def drop(*attributes: str) -> Adapter:
    """The attributes are gone, and say nothing that opset 18 needs."""

    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        for name in attributes:
            node.attributes.pop(name, None)
        return node

    return adapter


def drop_default(**defaults: int | str) -> Adapter:
    """Attributes that are new: dropped where they have the value that opset 18 implies."""

    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        for name, default in defaults.items():
            if name in node.attributes and node.attributes[name].value == default:
                node.attributes.pop(name)
        return node

    return adapter


def write_default(name: str, value: int | float | str) -> Adapter:
    """The default changed: write the old one out."""

    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        if name not in node.attributes:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        return node

    return adapter


def ints_to_input(name: str, index: int = 1) -> Adapter:
    """An attribute with integers became an int64 input."""

    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        values = pop(node, name)
        if values:
            set_input(node, names, index, np.asarray(values, np.int64), name)
        return node

    return adapter


def refuse(reason: str) -> Adapter:
    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        raise unsupported(node, reason)

    return adapter


def refuse_value(name: str, value: str) -> Adapter:
    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        if name in node.attributes and node.attributes[name].value == value:
            raise unsupported(node, f"{name} = {value!r} is newer")
        return node

    return adapter


def in_turn(*adapters: Adapter) -> Adapter:
    def adapter(node: ir.Node, names: FreeNames) -> ir.Node:
        for each in adapters:
            each(node, names)
        return node

    return adapter
