"""Puts nodes into a graph at one place after the other, with the types and shapes that later passes read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import add_initializer
from rewriter.names import FreeNames

Dimensions = Sequence[int | ir.SymbolicDim] | ir.Shape


class Emitter:
    """Emits nodes in order: the first behind `after`, or at the head of the graph, each behind the last."""

    def __init__(self, graph: ir.Graph, names: FreeNames, prefix: str, after: ir.Node | None = None) -> None:
        self._graph = graph
        self._names = names
        self._prefix = prefix
        self._last = after

    def at(self, prefix: str) -> Emitter:
        """Names nodes after something else from now on."""
        self._prefix = prefix
        return self

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        shape: Dimensions | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node.

        Args:
            shape: of the output, None where even the rank is unknown.
            name: of the output, which must be free.
        """
        return self.ops(
            op_type, *inputs, shapes=(shape,), dtype=dtype, domain=domain, names=(name,), **attributes
        )[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value,
        shapes: Sequence[Dimensions | None],
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        names: Sequence[str | None] | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """The outputs of a new node, all of the same type."""
        name = self._names.take(f"{self._prefix}/{op_type}")
        outputs = []
        for index, shape in enumerate(shapes):
            wanted = None if names is None else names[index]
            outputs.append(
                ir.Value(
                    name=wanted or self._names.take(f"{name}_output_{index}" if index else f"{name}_output"),
                    shape=None if shape is None else ir.Shape(list(shape)),
                    type=ir.TensorType(dtype),
                )
            )
        self._insert(ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=name))
        return tuple(outputs)

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> ir.Value:
        """A new initializer."""
        return add_initializer(
            self._graph, self._names.take(f"{self._prefix}/constant"), np.asarray(values, dtype)
        )

    def insert(self, node: ir.Node) -> None:
        """Put a node that exists already at this place."""
        self._insert(node)

    def _insert(self, node: ir.Node) -> None:
        if self._last is None:
            if len(self._graph):
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.append(node)
        else:
            self._graph.insert_after(self._last, node)
        self._last = node
