"""What a run says of itself: records for a program, lines for a person, phases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewriter.bundle import read_manifest
from rewriter.errors import ErrorCode, QatError
from rewriter.finetune import LogRecord, Phase, finetune
from rewriter.finetune.phases import Delays
from rewriter.recipe import Override, Recipe
from rewriter.training.checkpoint import read_checkpoint
from tests.rewriter.small_bundles import make_bundle, stop_after, write_samples
from tests.rewriter.training import nets

# 15 steps an epoch.
ARGUMENTS = {"epochs": 2, "batch_size": 7, "learning_rate": 1e-2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "train.npz")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path, nets.mlp())


def records(bundle: Path, data: Path, **arguments: object) -> list[LogRecord]:
    found: list[LogRecord] = []
    finetune(bundle, data, log=found.append, **(ARGUMENTS | arguments))
    return found


def steps(found: list[LogRecord]) -> list[int]:
    return [record.step for record in found if record.event == "step"]


def test_every_so_many_steps_and_at_the_end_of_an_epoch_a_step_is_logged(bundle: Path, data: Path) -> None:
    assert steps(records(bundle, data, log_every=6)) == [1, 6, 12, 15, 18, 24, 30]
    assert steps(records(bundle, data)) == [1, 15, 30]


def test_a_record_holds_the_mean_loss_since_the_one_before(bundle: Path, data: Path) -> None:
    every = [record.loss for record in records(bundle, data, log_every=1)]
    found = records(bundle, data, log_every=5)
    assert found[1].loss == pytest.approx(sum(every[1:5]) / 4)
    assert found[2].loss == pytest.approx(sum(every[5:10]) / 5)


def test_a_step_has_its_place_learning_rate_and_speed(bundle: Path, data: Path) -> None:
    found = records(bundle, data, log_every=1)
    assert [(record.epoch, record.epochs, record.steps) for record in found] == [
        (1 + step // 15, 2, 30) for step in range(30)
    ]
    rates = [record.learning_rate for record in found]
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert all(record.steps_per_second > 0 for record in found)
    assert {record.accuracy for record in found} == {None}


def test_evaluations_come_before_the_first_step_and_after_each_epoch(bundle: Path, data: Path) -> None:
    found: list[LogRecord] = []
    report = finetune(bundle, data, evaluation=data, log=found.append, **ARGUMENTS)
    evaluations = [record for record in found if record.event == "evaluation"]
    assert [record.step for record in evaluations] == [0, 15, 30]
    for record, result in ((evaluations[0], report.before), (evaluations[-1], report.after)):
        assert (record.loss, record.accuracy) == (result.loss, result.accuracy)
        assert record.steps_per_second is None
    assert evaluations[0].learning_rate is None


def test_evaluations_come_every_so_many_steps_and_at_the_end(bundle: Path, data: Path) -> None:
    found = records(bundle, data, evaluation=data, eval_every=8)
    assert [record.step for record in found if record.event == "evaluation"] == [0, 8, 16, 24, 30]


def test_evaluating_and_logging_do_not_change_what_is_trained(tmp_path: Path, data: Path) -> None:
    bundle = make_bundle(tmp_path, nets.mlp(), Recipe(ranges="moving_average"))
    outs = [tmp_path / "one", tmp_path / "other"]
    finetune(bundle, data, checkpoint_out=outs[0], **ARGUMENTS)
    records(bundle, data, evaluation=data, eval_every=3, log_every=1, save_every=4, checkpoint_out=outs[1])
    one, other = (read_checkpoint(out) for out in outs)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


class TestPhases:
    def test_training_is_quantized_from_the_delay_on(self, tmp_path: Path, data: Path) -> None:
        bundle = make_bundle(tmp_path, nets.mlp(), Recipe(quant_delay=20))
        found = records(bundle, data, evaluation=data, eval_every=19)
        logged = [(record.event, record.step, str(record.phase)) for record in found]
        assert logged == [
            ("evaluation", 0, "float"),
            ("step", 1, "float"),
            ("step", 15, "float"),
            ("evaluation", 19, "float"),
            ("step", 20, "quantized"),  # not due, but for the change
            ("step", 30, "quantized"),
            ("evaluation", 30, "quantized"),
        ]

    def test_batch_norms_are_frozen_from_their_delay_on(self, tmp_path: Path, data: Path) -> None:
        recipe = Recipe(quant_delay=4, freeze_bn_delay=18)
        bundle = make_bundle(tmp_path, nets.batch_norm_mlp(), recipe)
        found = records(bundle, data, log_every=1)
        phases = ["float"] * 3 + ["quantized"] * 14 + ["frozen"] * 13
        assert [str(record.phase) for record in found] == phases
        assert found[-1].phase.batch_norms == 1

    def test_a_batch_norm_that_was_folded_once_does_not_count(self, tmp_path: Path, data: Path) -> None:
        bundle = make_bundle(tmp_path, nets.batch_norm_mlp(), Recipe(batch_norm="fold_inference"))
        assert {record.phase.batch_norms for record in records(bundle, data)} == {0}

    def test_the_counter_goes_on_in_a_run_that_starts_from_a_checkpoint(
        self, tmp_path: Path, data: Path
    ) -> None:
        """It is the training graph's: a run from trained weights need not wait again."""
        bundle = make_bundle(tmp_path, nets.mlp(), Recipe(quant_delay=40))
        first = finetune(bundle, data, checkpoint_out=tmp_path / "first", **ARGUMENTS)
        found = records(bundle, data, checkpoint=first.checkpoint)
        assert [(record.step, str(record.phase)) for record in found if record.phase.quantizers_on][:1] == [
            (10, "quantized")
        ]

    @pytest.mark.parametrize(("counts", "expected"), [("executions", 7), ("optimizer_steps", 20)])
    def test_it_counts_what_the_recipe_says(
        self, tmp_path: Path, data: Path, counts: str, expected: int
    ) -> None:
        bundle = make_bundle(tmp_path, nets.mlp(), Recipe(quant_delay=20, step_counter=counts))
        found = records(bundle, data, epochs=4, accumulate=3)  # 4 steps an epoch of 21 samples each
        first = next((r.step for r in found if r.phase.quantizers_on), None)
        assert first == (expected if expected <= 16 else None)
        manifest = read_manifest(bundle)
        counter = read_checkpoint(bundle / "trained_checkpoint")[manifest.training.step_counter.state]
        assert counter == {"executions": 16 * 3, "optimizer_steps": 16}[counts]

    def test_where_delays_differ_it_says_how_many(self, tmp_path: Path, data: Path) -> None:
        overrides = (Override(match="node_y", quant_delay=10),)
        bundle = make_bundle(tmp_path, nets.mlp(), Recipe(quant_delay=3, overrides=overrides))
        total = len(read_manifest(bundle).quantizers)
        phases = list(dict.fromkeys(str(record.phase) for record in records(bundle, data)))
        assert phases[0] == "float"
        assert phases[1].startswith("quantized ")
        assert phases[1].endswith(f"/{total}")
        assert phases[2:] == ["quantized"]

    @pytest.mark.parametrize(
        ("delays", "counter", "text"),
        [
            (Delays((0, 0), (), 0), 0, "quantized"),
            (Delays((5, 5), (), 0), 4, "float"),
            (Delays((5, 5), (), 0), 5, "quantized"),
            (Delays((5, 9, 9), (), 0), 8, "quantized 1/3"),
            (Delays((5, 5), (8, 8), 2), 7, "quantized"),
            (Delays((5, 5), (8, 8), 2), 8, "frozen"),
            (Delays((5, 5), (8,), 2), 8, "quantized, frozen 1/2"),  # the other one never freezes
            (Delays((5, 9), (8, 8), 2), 8, "quantized 1/2, frozen 2/2"),
        ],
    )
    def test_the_words(self, delays: Delays, counter: int, text: str) -> None:
        assert str(delays.phase(counter)) == text


def record(**changed: object) -> LogRecord:
    fields = {
        "event": "step",
        "step": 50,
        "steps": 1000,
        "epoch": 1,
        "epochs": 20,
        "loss": 0.25,
        "accuracy": None,
        "learning_rate": 1e-3,
        "steps_per_second": 12.34,
        "phase": Phase(12, 20, 0, 5),
    }
    return LogRecord(**(fields | changed))


def test_a_record_is_a_line_for_a_person() -> None:
    assert str(record()) == (
        "epoch  1/20  step   50/1000  loss 0.2500  lr 1.00e-03  12.3 steps/s  quantized 12/20"
    )
    evaluation = record(event="evaluation", accuracy=0.987, steps_per_second=None)
    assert str(evaluation) == (
        "epoch  1/20  step   50/1000  evaluation  loss 0.2500  top-1 98.70 %  quantized 12/20"
    )


def test_a_record_is_a_line_for_a_machine() -> None:
    line = record().to_json()
    assert "\n" not in line
    assert json.loads(line) == {
        "event": "step",
        "step": 50,
        "steps": 1000,
        "epoch": 1,
        "epochs": 20,
        "loss": 0.25,
        "accuracy": None,
        "learning_rate": 1e-3,
        "steps_per_second": 12.34,
        "phase": "quantized 12/20",
        "quantizers_on": 12,
        "quantizers": 20,
        "batch_norms_frozen": 0,
        "batch_norms": 5,
    }


def test_a_resumed_run_logs_from_where_it_goes_on(bundle: Path, data: Path) -> None:
    with pytest.raises(QatError) as caught:
        finetune(bundle, data, stop=stop_after(12), **ARGUMENTS)
    assert caught.value.code == ErrorCode.TRAINING_INTERRUPTED
    assert steps(records(bundle, data, resume=True, log_every=10)) == [13, 15, 20, 30]
