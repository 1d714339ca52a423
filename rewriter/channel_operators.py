"""The nodes that stand for batch normalization in a training graph until it is differentiated.

    mean, variance = ChannelStatistics(x)          over all axes but 1; the population's
    y = ChannelAffine(x, a, b) = a * x + b         a and b per channel

x has channels on axis 1; the vectors have shape [channels], all are float32. Each is one node so that its
gradient is one rule; `lower_channel_operators` spells them out in standard operators afterwards. The nodes
never reach a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter.fake_quantize import DOMAIN
from rewriter.initializers import add_initializer
from rewriter.names import FreeNames

STATISTICS: Final = "ChannelStatistics"
AFFINE: Final = "ChannelAffine"


def along_channels(rank: int) -> list[int]:
    """The shape that makes a vector [channels] broadcast along axis 1 of a tensor of that rank."""
    return [-1, *[1] * (rank - 2)]


def all_but_channels(rank: int) -> list[int]:
    return [0, *range(2, rank)]


def lower_channel_operators(graph: ir.Graph) -> None:
    """Replace every ChannelStatistics and ChannelAffine by standard operators, in place."""
    names = FreeNames(graph)
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in (STATISTICS, AFFINE):
            lowering = _Lowering(graph, names, node, constants)
            outputs = lowering.affine() if node.op_type == AFFINE else lowering.statistics()
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], lowering.nodes, node.outputs, outputs
            )


class _Lowering:
    def __init__(
        self,
        graph: ir.Graph,
        names: FreeNames,
        node: ir.Node,
        constants: dict[tuple[int, ...], ir.Value],
    ) -> None:
        self._graph = graph
        self._names = names
        self._node = node
        self._constants = constants
        self.nodes: list[ir.Node] = []

    def affine(self) -> Sequence[ir.Value]:
        x, a, b = self._node.inputs
        rank = _rank(self._node)
        if rank > 2:
            shape = self._ints(along_channels(rank))
            a, b = self._op("Reshape", a, shape), self._op("Reshape", b, shape)
        return [self._op("Add", self._op("Mul", x, a), b)]

    def statistics(self) -> Sequence[ir.Value]:
        """The variance of the differences: a mean of squares less a squared mean cancels."""
        x, rank = self._node.inputs[0], _rank(self._node)
        axes = self._ints(all_but_channels(rank))
        mean = self._op("ReduceMean", x, axes, keepdims=1)
        difference = self._op("Sub", x, mean)
        variance = self._op("ReduceMean", self._op("Mul", difference, difference), axes, keepdims=0)
        return [self._op("Reshape", mean, self._ints([-1])), variance]

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        name = self._names.take(f"{self._node.name}/{op_type}")
        output = ir.Value(name=self._names.take(f"{name}_output"), type=ir.TensorType(ir.DataType.FLOAT))
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    def _ints(self, numbers: list[int]) -> ir.Value:
        key = tuple(numbers)
        if key not in self._constants:
            name = self._names.take("channels/constant")
            self._constants[key] = add_initializer(self._graph, name, np.array(numbers, np.int64))
        return self._constants[key]


def _rank(node: ir.Node) -> int:
    x = node.inputs[0]
    if x is None or x.shape is None:
        raise ValueError(f"{node.op_type} {node.name!r} on a tensor whose rank is not known")
    return len(x.shape)
