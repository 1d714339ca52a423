"""benchmarks/fashion_mnist.py: the same start and batches for every model; training pays at few bits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import rewriter
from benchmarks import fashion_parameterizations
from benchmarks.fashion_mnist import SHORT, report
from benchmarks.fashion_parameterizations import Parameterization, Trial, change_parameterization, run_trial
from benchmarks.fashion_schedule import Schedule
from benchmarks.fashion_torch_program import write_qat_program
from benchmarks.fashion_training import Session
from benchmarks.fashion_variants import (
    FIXED,
    FLOAT,
    LEARNED,
    MORE_FLOAT,
    MOVING_AVERAGE,
    STATIC,
    TORCH,
    Outcome,
    Run,
    make,
)
from benchmarks.resnet import resnet
from examples.fashion_mnist import load_fashion_mnist

REPOSITORY = Path(__file__).parents[2]
SMALL = dataclasses.replace(SHORT, widths=(4, 8), train_samples=256, test_samples=256)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[tuple[str, int | None], Outcome]]:
    """The printed text and the outcomes of `--short`."""
    file = tmp_path_factory.mktemp("short") / "short.json"
    command = [sys.executable, "-m", "benchmarks.fashion_mnist", "--short", "--json", str(file)]
    run = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    outcomes = [Outcome(**entry) for entry in json.loads(file.read_text())["outcomes"]]
    return run.stdout, {(outcome.method, outcome.bits): outcome for outcome in outcomes}


def test_the_short_run_has_every_row(short: tuple[str, dict[tuple[str, int | None], Outcome]]) -> None:
    text, outcomes = short
    one = {(FLOAT, None), (MORE_FLOAT, None), (STATIC, 8)}
    assert outcomes.keys() == one | {(m, b) for m in (FIXED, MOVING_AVERAGE, LEARNED) for b in (8, 2)}
    for method in (FLOAT, MORE_FLOAT, STATIC, FIXED, MOVING_AVERAGE, LEARNED):
        (line,) = [line for line in text.split("\n\n")[0].splitlines() if line.startswith(f"{method}  ")]
        assert f"{outcomes[method, None if method in (FLOAT, MORE_FLOAT) else 8].top1:.2f} (" in line


def test_training_pays_at_two_bits_and_costs_nothing_at_eight(
    short: tuple[str, dict[tuple[str, int | None], Outcome]],
) -> None:
    top1 = {key: outcome.top1 for key, outcome in short[1].items()}
    assert top1[FLOAT, None] > 75
    assert top1[LEARNED, 8] > top1[FLOAT, None] - 1
    assert top1[STATIC, 8] > top1[FLOAT, None] - 2
    assert top1[LEARNED, 2] > top1[FIXED, 2] + 15
    assert top1[LEARNED, 2] > top1[MOVING_AVERAGE, 2]


def test_training_lowers_the_loss(short: tuple[str, dict[tuple[str, int | None], Outcome]]) -> None:
    for (method, bits), outcome in short[1].items():
        if method in (MORE_FLOAT, STATIC, FIXED) or (method, bits) == (LEARNED, 8):
            continue  # not trained, or trained from an optimum
        tenth = len(outcome.losses) // 10
        assert np.mean(outcome.losses[-tenth:]) < np.mean(outcome.losses[:tenth]), (method, bits)


def test_a_schedule_says_every_batch_and_half_of_the_images_are_mirrored() -> None:
    schedule = Schedule(samples=100, epochs=2, batch_size=32, learning_rate=0.5, seed=7)
    pixels = np.zeros((120, 1, 28, 28), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(120)  # which image, and in which corner
    pixels[:, 0, 0, 1] = 255
    labels = np.arange(120)
    batches = list(schedule.batches(pixels, labels))
    assert len(batches) == schedule.steps == 6
    for images, chosen in batches:
        mirrored = images[:, 0, 0, -2] == 1
        corner = np.where(mirrored, images[:, 0, 0, -1], images[:, 0, 0, 0])
        np.testing.assert_allclose(corner * 255, chosen, atol=1e-4)
        assert 4 <= mirrored.sum() <= 28
    first, second = (np.concatenate([b[1] for b in batches[i : i + 3]]) for i in (0, 3))
    assert len(set(first.tolist())) == 96
    assert max(first) < 100
    assert first.tolist() != second.tolist()
    again = list(schedule.batches(pixels, labels))
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
    assert [schedule.rate(step) for step in (0, 3)] == [0.5, 0.25]


def test_the_table_shows_means_ranges_and_what_is_expected() -> None:
    outcomes = [
        *(Outcome(FLOAT, None, seed, top1) for seed, top1 in enumerate((91.0, 92.0))),
        *(Outcome(STATIC, 8, seed, top1) for seed, top1 in enumerate((90.5, 92.25))),
        *(Outcome(MOVING_AVERAGE, 4, seed, 90.0) for seed in range(2)),
        *(Outcome(LEARNED, 8, seed, top1, 60.0) for seed, top1 in enumerate((91.25, 92.25))),
        *(Outcome(LEARNED, 4, seed, top1, 80.0) for seed, top1 in enumerate((90.0, 91.5))),
        *(Outcome(TORCH, 4, seed, top1) for seed, top1 in enumerate((90.5, 91.5))),
        Outcome(TORCH, 8, 0, error="no torch"),
    ]
    lines = [line.split("  ") for line in report(outcomes, (8, 4)).splitlines()]
    table = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in reversed(lines)}
    assert table[FLOAT] == ["91.50 (91.00..92.00)"]
    assert table[STATIC] == ["91.38 (90.50..92.25)", "not offered"]
    assert table[LEARNED] == ["91.75 (91.25..92.25)", "90.75 (90.00..91.50)", "70"]
    assert table[TORCH] == ["failed", "91.00 (90.50..91.50)"]
    assert table["W8A8 learned - float"] == ["+0.25", ">= +0.00", "yes"]
    assert table["W4A4 learned - float"] == ["-0.75", ">= +0.00", "NO"]
    assert table["W4A4 learned - PyTorch"] == ["-0.25", ">= -1.50", "yes"]
    assert table["W4A4 learned - moving averages"] == ["+0.75", ">= +0.00", "yes"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small network as initialized, and samples to calibrate with."""
    run = Run(SMALL, 0, tmp_path_factory.mktemp("small"), bits=4)
    onnx.save(resnet(SMALL.widths, 1, stem_stride=2), run.float_model)
    load_fashion_mnist().calibration.save(run.calibration)
    return run


def test_without_torch_its_rows_say_so(small: Run) -> None:
    outcome = make(TORCH, dataclasses.replace(small, torch_python=sys.executable))
    assert "torch" in (outcome.error or "")


def test_the_torch_program_trains_every_batch_norm_and_no_folded_weight(small: Run, tmp_path: Path) -> None:
    write_qat_program(small.float_model, SMALL.recipe(4, "learned"), small.calibration, tmp_path)
    program = json.loads((tmp_path / "program.json").read_text())
    operators = [node["op"] for node in program["nodes"]]
    layers = [node.op_type for node in onnx.load(small.float_model).graph.node]
    assert operators.count("ConvBatchNorm") == operators.count("FoldedWeight") == layers.count("Conv")
    assert "Conv" not in operators
    with np.load(tmp_path / "weights.npz") as weights:
        assert set(program["trainable"]) <= set(weights.files)
        trained = sum(weights[name].size for name in program["trainable"])
        np.testing.assert_array_equal(weights["stem.bn.running_var"], np.ones(4))
    assert trained == sum(
        int(np.prod(tensor.dims))
        for tensor in resnet(SMALL.widths, 1).graph.initializer
        if "running" not in tensor.name
    )
    made = set(program["trainable"]) | {"images", "labels"}
    for node in program["nodes"]:
        if node["op"] == "ConvBatchNorm":
            assert node["inputs"][0] in made  # nodes in order
        made.add(node["output"])


@pytest.fixture(scope="module")
def step(
    small: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], dict[str, np.ndarray]]:
    """`step(form, factor)`: what one step of SGD at rate 1 subtracts from each scale's parameter."""

    def run_step(form: str, factor: bool) -> dict[str, np.ndarray]:
        bundle = tmp_path_factory.mktemp("step") / "bundle"
        settings = dataclasses.replace(SMALL, qat_rate=1.0, train_samples=64)
        recipe = settings.recipe(4, "learned").model_copy(update={"optimizer": "sgd"})
        manifest = rewriter.prepare(small.float_model, bundle, recipe=recipe, calibration=small.calibration)
        change_parameterization(bundle, manifest, Parameterization(form, factor))  # type: ignore[arg-type]
        session = Session(bundle)
        samples = load_fashion_mnist().train.part(0, 64)
        (loss,) = session.train(samples, settings.qat_schedule(0)).losses
        learned = {q.scale: q for q in manifest.quantizers if q.scale_parameter is not None}
        changes = {n: -np.array(session.state.parameters[q.scale_parameter].data) for n, q in learned.items()}
        scales = {f"{name}=": np.reshape(q.initial_scale, changes[name].shape) for name, q in learned.items()}
        return changes | scales | {"loss": np.array(loss)}

    return run_step


def test_other_parameterizations_begin_alike_and_differ_by_their_gradients(
    step: Callable[[str, bool], dict[str, np.ndarray]],
) -> None:
    exp, linear, bare = step("exp", True), step("linear", True), step("linear", False)
    assert exp["loss"] == linear["loss"] == bare["loss"]
    assert any(np.abs(exp[name]).max() > 1e-4 for name in exp if name.endswith("_scale"))
    for name, change in exp.items():
        if name.endswith("_scale"):
            np.testing.assert_allclose(change, exp[f"{name}="] * linear[name], rtol=1e-3, atol=1e-7)
    # The stem's weights are 9 a channel, of 8 bits: 1 / g = sqrt(9 * 127).
    name = "stem.weight_folded_scale"
    np.testing.assert_allclose(bare[name], linear[name] * np.sqrt(9 * 127), rtol=1e-3, atol=1e-6)


def test_a_trial_trains_with_its_own_optimizer_and_rate(small: Run) -> None:
    linear = Parameterization("linear", True)
    trials = [Trial("adamw", 1e-4, 4, linear), Trial("adamw", 1.0, 4, linear), Trial("sgd", 1e-4, 4, linear)]
    slow, fast, sgd = results = [run_trial(small, trial) for trial in trials]
    assert slow.crossed == 0 < fast.crossed
    assert 0 < sgd.moved < slow.moved
    assert all(np.isfinite(result.loss) and 0 <= result.top1 <= 100 for result in (slow, sgd))
    lines = fashion_parameterizations.report([*results, slow]).splitlines()
    cells = ["adamw", "0.0001", "4", "linear,", "g", f"{slow.loss:.4f}", f"{slow.top1:.2f}", "0"]
    assert lines[1].split()[:8] == cells
    assert len(lines) == 4
