"""Every rule gives what finite differences give, whatever is known of the shapes."""

import pytest
from gradient_cases import CASES
from gradient_check import Case, check

from rewriter.gradients.registry import RULES


@pytest.mark.parametrize(
    ("case", "shapes"), [pytest.param(c, s, id=f"{c}-{s}") for c in CASES for s in c.shapes]
)
def test_gradient_equals_finite_differences(case: Case, shapes: str) -> None:
    check(case, shapes)


def test_every_rule_has_a_case() -> None:
    ours = {("qat", "FakeQuantize"), ("qat", "FakeQuantizeBias")}  # test_gradients_quantizer.py
    assert {("", case.op_type) for case in CASES} == set(RULES) - ours
