"""Where a node stands."""

from __future__ import annotations

import onnx_ir as ir


def owning_graph(node: ir.Node) -> ir.Graph:
    """The graph that `node` stands in (functions are inlined, so that it is not a function)."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph
