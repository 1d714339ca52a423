"""Names for the values and nodes that a pass adds: deterministic, and free in the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import onnx_ir as ir

_RESERVED: Final = "rewriter.reserved_names"


def reserve_names(graph: ir.Graph, names: Iterable[str]) -> None:
    """Keep names that are not in the graph now, and will be again, from being given to something else."""
    graph.meta[_RESERVED] = frozenset({*graph.meta.get(_RESERVED, ()), *names})


class FreeNames:
    """Gives names that no value or node of the model, or of its subgraphs, has."""

    def __init__(self, model: ir.Model | ir.Graph) -> None:
        graph = model.graph if isinstance(model, ir.Model) else model
        self._taken: set[str] = {value.name or "" for value in graph.inputs}
        self._taken.update(graph.meta.get(_RESERVED, ()))
        self._taken.update(graph.initializers)
        for subgraph in graph.subgraphs():
            self._taken.update(value.name or "" for value in subgraph.inputs)
            self._taken.update(subgraph.initializers)
        for node in graph.all_nodes():
            self._taken.add(node.name or "")
            self._taken.update(output.name or "" for output in node.outputs)
        # Numbers up to these are taken: a name that is asked for often is not searched from the start.
        self._counts: dict[tuple[str, tuple[str, ...]], int] = {}

    def is_free(self, name: str) -> bool:
        return name not in self._taken

    def take(self, name: str) -> str:
        """`name`, or `name` with the first number that makes it free; from now on it is taken."""
        return self.take_stem(name, ("",))

    def take_stem(self, stem: str, suffixes: tuple[str, ...]) -> str:
        """A stem for which stem + suffix is free for all suffixes; these names are taken from now on."""
        count = self._counts.get((stem, suffixes), 1)
        free = stem if count == 1 else f"{stem}_{count}"
        while any(free + suffix in self._taken for suffix in suffixes):
            count += 1
            free = f"{stem}_{count}"
        self._counts[stem, suffixes] = count
        self._taken.update(free + suffix for suffix in suffixes)
        return free
