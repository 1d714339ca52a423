"""What placement does to small graphs, as text: golden/*.txt holds a graph, then the same graph with its
quantizers, and what was skipped. A change of policy shows there as a diff."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.rewriter.graphs import graph, listing, quantized

GOLDEN = sorted(Path(__file__).with_name("golden").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    source = path.read_text().split("\n\n")[0]
    model = graph(source, flat=np.array([-1, 256]))
    plan = quantized(model)
    found = f"{source}\n\n{listing(model)}\n"
    if plan.skipped:
        found += "\nskipped:\n" + "".join(f"{one.op} {one.node}: {one.reason}\n" for one in plan.skipped)
    assert found == path.read_text()
