"""Every rule gives what finite differences give, whatever is known of the shapes."""

import pytest
from gradient_cases import CASES
from gradient_check import Case, check

from rewriter.fake_quantize import DOMAIN
from rewriter.gradients.registry import RULES


@pytest.mark.parametrize(
    ("case", "shapes"), [pytest.param(c, s, id=f"{c}-{s}") for c in CASES for s in c.shapes]
)
def test_gradient_equals_finite_differences(case: Case, shapes: str) -> None:
    check(case, shapes)


def test_every_rule_has_a_case() -> None:
    # Our own nodes: test_gradients_quantizer.py, test_training_batch_norm.py, test_training_artifacts.py.
    assert {("", case.op_type) for case in CASES} == {rule for rule in RULES if rule[0] != DOMAIN}
