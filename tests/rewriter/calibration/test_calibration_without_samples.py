"""rewriter/calibration without samples: ranges that the graph tells, else random inputs; it says which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter.calibration import calibrate
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.load import load
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.quantization import IntegerRange, Plan, QuantizedTensor, Quantizer, QuantizerParameters
from rewriter.recipe import Calibration, Recipe


def model_of(body: str, signature: str = "(float[N, 3, H, W] x) => (float[N, C, H2, W2] out)") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 18]> net {signature} {body}'
    return ir.from_proto(onnx.parser.parse_model(text))


def calibrated(
    model: ir.Model,
    *tensors: str,
    bits: int = 8,
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> QuantizerParameters:
    range_ = IntegerRange.for_activations(bits, symmetric=False)
    group = tuple(QuantizedTensor(name, ()) for name in tensors)
    quantizer = Quantizer("q", "activation", bits, range_, False, None, group)
    return calibrate(model, Plan((quantizer,), (), ()), Recipe(), None, statistics=statistics)["q"]


def covered(parameters: QuantizerParameters, qmax: int = 255) -> tuple[float, float]:
    zero_point = int(parameters.zero_point)
    return -zero_point * float(parameters.scale), (qmax - zero_point) * float(parameters.scale)


@pytest.mark.parametrize("mean", ["GlobalAveragePool (n)", "ReduceMean <axes = [2, 3]> (n)"])
def test_how_much_means_vary_does_not_follow_from_batch_norm(mean: str) -> None:
    model = model_of(f"{{ n = Neg (x)\n out = {mean} }}")
    model.opset_imports[""] = 13  # axes are an attribute
    statistics = {"n": (np.zeros(3), np.ones(3))}
    assert calibrated(model, "n", statistics=statistics).initialized == "batch_norm"
    assert calibrated(model, "out", statistics=statistics).initialized == "uncalibrated:random_inputs"


@pytest.mark.parametrize(
    ("operator", "low", "high"),
    [
        ("Sigmoid (x)", 0, 1),
        ("HardSigmoid (x)", 0, 1),
        ("Softmax (x)", 0, 1),
        ("Tanh (x)", -1, 1),
        ("Clip (x, zero, six)", 0, 6),
    ],
)
def test_bounded_operators(operator: str, low: float, high: float) -> None:
    model = model_of(f"<float zero = {{0.0}}, float six = {{6.0}}> {{ out = {operator} }}")
    parameters = calibrated(model, "out")
    assert parameters.initialized == "bounds"
    assert covered(parameters) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize(
    "operator",
    [
        "Transpose <perm = [0, 1, 3, 2]> (s)",
        "MaxPool <kernel_shape = [2, 2]> (s)",
        "AveragePool <kernel_shape = [2, 2]> (s)",
        "GlobalAveragePool (s)",
        "Concat <axis = 1> (s, s)",
        "Flatten (s)",
        "Relu (s)",
    ],
)
def test_bounds_pass_through_what_moves_or_averages_data(operator: str) -> None:
    parameters = calibrated(model_of(f"{{ s = Sigmoid (x)\n out = {operator} }}"), "out")
    assert parameters.initialized == "bounds"
    assert covered(parameters) == pytest.approx((0, 1), abs=1e-3)


def test_a_concatenation_with_an_unknown_part_is_unknown() -> None:
    model = model_of("{ s = Sigmoid (x)\n out = Concat <axis = 1> (s, x) }")
    assert calibrated(model, "out").initialized == "uncalibrated:random_inputs"


@pytest.mark.parametrize(("bits", "deviations"), [(2, 1.71), (4, 2.55), (8, 3.92), (16, 5.94)])
def test_batch_norm_statistics_give_the_range(bits: int, deviations: float) -> None:
    model = model_of("{ y = Exp (x)\n r = Relu (y)\n out = Identity (r) }")
    statistics = {"y": (np.array([1.0, -2.0]), np.array([0.5, 1.0]))}
    qmax = 2**bits - 1
    before = calibrated(model, "y", bits=bits, statistics=statistics)
    high = max(1 + deviations / 2, deviations - 2)
    assert before.initialized == "batch_norm"
    assert qmax * float(before.scale) == pytest.approx(high + 2 + deviations, rel=1e-5)
    for after in ("r", "out"):  # Relu takes away what lies below zero
        parameters = calibrated(model, after, bits=bits, statistics=statistics)
        assert parameters.initialized == "batch_norm"
        assert covered(parameters, qmax) == pytest.approx((0, high))


def test_a_real_model_gets_the_ranges_of_its_batch_norms(real_model: Callable[[str], Path]) -> None:
    """Most of them within a factor of 4 of what standard normal images give: no better truth is known."""
    model = load(real_model("ppocr2-cls"))
    normalize(model)
    statistics = fold_batch_norms(model).statistics
    plan = place(model, Recipe())
    recipe = Recipe(calibration=Calibration(method="minmax"))
    found = calibrate(model, plan, recipe, None, statistics=statistics)
    random = calibrate(model, plan, recipe, NormalImages((3, 48, 192)))
    known = [name for name, one in found.items() if one.initialized == "batch_norm"]
    activations = [quantizer for quantizer in plan.quantizers if quantizer.kind == "activation"]
    means = [node.outputs[0].name for node in model.graph if node.op_type == "GlobalAveragePool"]
    assert len(means) > 0
    assert not set(means) & set(known)
    # The means are unknown, and so is what the squeeze-and-excitation blocks make of them.
    assert len(known) > 0.45 * len(activations)
    ratios = np.array([float(found[name].scale / random[name].scale) for name in known])
    assert 1 / 2 < np.median(ratios) < 2
    assert np.mean((ratios > 1 / 4) & (ratios < 4)) > 0.8


@dataclasses.dataclass(frozen=True)
class NormalImages:
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return 4

    def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        for _ in range(len(self)):
            yield {"x": rng.standard_normal((1, *self.shape)).astype(np.float32)}


def test_a_group_is_known_if_all_of_its_tensors_are() -> None:
    model = model_of("{ s = Sigmoid (x)\n t = Tanh (x)\n out = Add (s, t) }")
    assert calibrated(model, "s", "t").initialized == "bounds"
    assert covered(calibrated(model, "s", "t")) == pytest.approx((-1, 1), abs=0.01)
    assert calibrated(model, "s", "out").initialized == "uncalibrated:random_inputs"


def test_otherwise_the_model_runs_on_random_inputs_the_same_every_time() -> None:
    model = model_of("<float three = {3.0}> { out = Mul (x, three) }")
    first, second = (calibrated(model, "out") for _ in range(2))
    assert first.initialized == "uncalibrated:random_inputs"
    assert first.scale.tobytes() == second.scale.tobytes()
    low, high = covered(first)
    assert -15 < low < -9
    assert 9 < high < 15


def test_random_token_ids_stay_inside_the_table() -> None:
    model = model_of(
        """<float[4, 1] table = {1.0, 2.0, 3.0, 9.0}> {
            e = Gather (table, ids)
            m = Cast <to = 1> (mask)
            out = Mul (e, m)
        }""",
        "(int64[N, L] ids, int64[N, L] mask) => (float[N, L, D] out)",
    )
    parameters = calibrated(model, "e")
    assert parameters.initialized == "uncalibrated:random_inputs"
    assert 8 < covered(parameters)[1] <= 9.1
    assert covered(calibrated(model, "m"))[1] == pytest.approx(1, rel=0.01)  # masks are ones


def test_a_model_that_random_inputs_do_not_fit_gets_the_default() -> None:
    model = model_of("<float[1, 7] w = {1, 2, 3, 4, 5, 6, 7}> { out = MatMul (x, w) }")
    parameters = calibrated(model, "out")
    assert parameters.initialized == "uncalibrated:default"
    assert covered(parameters) == pytest.approx((-4, 4), abs=0.05)
