"""Every rule gives what finite differences give, whatever is known of the shapes."""

import numpy as np
import pytest
from gradient_cases import CASES
from gradient_check import Case, check, forward_model, session, with_gradients

from rewriter.fake_quantize import DOMAIN
from rewriter.gradients.registry import RULES
from rewriter.recipe import TrainingDevice


@pytest.mark.parametrize(
    ("case", "shapes"), [pytest.param(c, s, id=f"{c}-{s}") for c in CASES for s in c.shapes]
)
@pytest.mark.parametrize("device", ["any", "cpu"])
def test_gradient_equals_finite_differences(case: Case, shapes: str, device: TrainingDevice) -> None:
    check(case, shapes, device=device)


@pytest.mark.parametrize("device", ["any", "cpu"])
@pytest.mark.parametrize("end", [1e-30, 0.1, 6.0, 1e30])
def test_a_clip_lets_through_to_the_last_float_of_its_range(end: float, device: TrainingDevice) -> None:
    high = np.float32(end)
    beyond = np.nextafter(high, np.float32(np.inf))
    x = np.array([-beyond, -high, 0, high, beyond, np.inf], np.float32)
    case = Case("Clip", "Clip", [x, -high, high], constants=(1, 2))
    (dx,) = session(with_gradients(forward_model(case, "static"), ["i0"], device)).run(
        ["d_i0"], {"i0": x, "r0": np.full(6, 3, np.float32)}
    )
    np.testing.assert_array_equal(dx, [0, 3, 3, 3, 0, 0])


@pytest.mark.parametrize("device", ["any", "cpu"])
def test_a_relu_lets_through_from_the_first_normal_float(device: TrainingDevice) -> None:
    x = np.array([-1, 0, np.finfo(np.float32).tiny, 1e30], np.float32)
    model = forward_model(Case("Relu", "Relu", [x]), "static")
    (dx,) = session(with_gradients(model, ["i0"], device)).run(
        ["d_i0"], {"i0": x, "r0": np.full(4, 3, np.float32)}
    )
    np.testing.assert_array_equal(dx, [0, 0, 3, 3])


def test_layer_normalization_is_spelled_out_for_the_cpu_alone() -> None:
    case = next(case for case in CASES if case.name == "LayerNormalization")
    kernels = [
        node.op_type
        for device in ("cpu", "any")
        for node in check(case, "static", device=device).graph.node
        if node.op_type == "LayerNormalizationGrad"
    ]
    assert kernels == ["LayerNormalizationGrad"]


def test_every_rule_has_a_case() -> None:
    # Our own nodes: test_gradients_quantizer.py, test_training_batch_norm.py, test_training_artifacts.py.
    assert {("", case.op_type) for case in CASES} == {rule for rule in RULES if rule[0] != DOMAIN}
