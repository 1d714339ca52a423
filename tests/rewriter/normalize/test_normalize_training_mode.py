"""The owner of a model that drops elements when it is used is told so."""

from __future__ import annotations

import pytest

from rewriter.normalize import normalize
from tests.rewriter.graphs import graph


def warnings(body: str, inputs: str = "") -> tuple[str, ...]:
    model = graph(
        f"g (float[N,3,8,8] x{inputs}) => (y) <float[4,3,3,3] w, float ratio, bool yes = {{1}}, "
        f"bool no = {{0}}> {{ c = Conv(x, w) {body} }}",
    )
    return tuple(warning for warning in normalize(model).warnings if "training mode" in warning)


@pytest.mark.parametrize(("mode", "inputs"), [("yes", ""), ("mode", ", bool mode")])
def test_dropout_that_drops(mode: str, inputs: str) -> None:
    (warning,) = warnings(f"y = Dropout(c, ratio, {mode})", inputs)
    assert warning.startswith("Dropout 'y_node' can be in training mode: outputs are random")


@pytest.mark.parametrize("dropout", ["Dropout(c)", "Dropout(c, ratio)", "Dropout(c, ratio, no)"])
def test_dropout_in_inference_is_no_warning(dropout: str) -> None:
    assert warnings(f"y = {dropout}") == ()


def test_several_are_one_sentence() -> None:
    (warning,) = warnings("a = Dropout(c, ratio, yes) b = Dropout(a, ratio, yes) y = Dropout(b, ratio, yes)")
    assert warning.startswith("Dropout 'a_node' and 2 more can be in training mode")
