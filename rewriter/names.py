"""Names for the values and nodes that a pass adds: deterministic, and free in the whole model."""

from __future__ import annotations

import onnx_ir as ir


class FreeNames:
    """Gives names that no value or node of the model, or of its subgraphs, has."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = {value.name or "" for value in model.graph.inputs}
        self._taken.update(model.graph.initializers)
        for subgraph in model.graph.subgraphs():
            self._taken.update(value.name or "" for value in subgraph.inputs)
            self._taken.update(subgraph.initializers)
        for node in model.graph.all_nodes():
            self._taken.add(node.name or "")
            self._taken.update(output.name or "" for output in node.outputs)

    def take(self, name: str) -> str:
        """`name`, or `name` with the first number that makes it free; from now on it is taken."""
        free, count = name, 1
        while free in self._taken:
            count += 1
            free = f"{name}_{count}"
        self._taken.add(free)
        return free

    def take_stem(self, stem: str, suffixes: tuple[str, ...]) -> str:
        """A stem for which stem + suffix is free for all suffixes; these names are taken from now on."""
        free, count = stem, 1
        while any(free + suffix in self._taken for suffix in suffixes):
            count += 1
            free = f"{stem}_{count}"
        self._taken.update(free + suffix for suffix in suffixes)
        return free
