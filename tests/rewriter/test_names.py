"""Free names: not taken anywhere in the model, the first number that is free, and quick to find."""

from __future__ import annotations

import time

from rewriter.names import FreeNames
from tests.rewriter.graphs import graph

IF = """g (float[2] x, bool c) => (y) <float[2] w> {
    a = Add(x, w)
    [choice] y = If(c) <
        then_branch = t () => (float[2] p) { [inner] p = Relu(a) },
        else_branch = e () => (float[2] q) { q = Neg(a) }
    >
}"""


def test_names_of_values_nodes_and_subgraphs_are_taken() -> None:
    model = graph(IF)
    for each in (model, model.graph):
        names = FreeNames(each)
        taken = ("x", "c", "w", "a", "y", "choice", "p", "q", "inner")
        assert [names.take(name) for name in taken] == [f"{name}_2" for name in taken]
        assert names.take("free") == "free"


def test_a_name_gets_the_first_free_number() -> None:
    names = FreeNames(graph("g (float[2] v, float[2] v_3) => (y) { y = Add(v, v_3) }"))
    assert [names.take("v") for _ in range(3)] == ["v_2", "v_4", "v_5"]
    assert names.take("v_3") == "v_3_2"


def test_a_stem_is_free_with_all_of_its_suffixes() -> None:
    names = FreeNames(graph("g (float[2] v_b) => (y) { y = Neg(v_b) }"))
    assert names.take_stem("v", ("_a", "_b")) == "v_2"
    assert names.take("v_a") == "v_a"
    assert names.take("v_2_b") == "v_2_b_2"
    assert names.take_stem("v", ("_a", "_b")) == "v_3"


def test_many_names_of_one_stem_take_time_in_proportion() -> None:
    names = FreeNames(graph("g (float[2] x) => (y) { y = Neg(x) }"))
    start = time.perf_counter()
    taken = {names.take("x") for _ in range(20_000)}
    assert len(taken) == 20_000
    assert time.perf_counter() - start < 2  # searched from the start each time, it is a minute
