"""What one step is: which samples, how their gradients come together, how far it goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.finetune import finetune
from rewriter.finetune.batches import Plan
from rewriter.finetune.schedule import learning_rate
from rewriter.recipe import Recipe
from rewriter.training.checkpoint import read_checkpoint
from tests.rewriter.small_bundles import SAMPLES, make_bundle, write_samples
from tests.rewriter.training import nets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "train.npz")


def plan(**changed: object) -> Plan:
    numbers = {"samples": 100, "batch_size": 7, "accumulate": 1, "whole": False, "epochs": 3, "seed": 0}
    return Plan(**(numbers | changed))


class TestBatches:
    def test_an_epoch_takes_every_sample_once_in_an_order_of_its_own(self) -> None:
        steps = list(plan().steps_after(0))
        assert len(steps) == plan().steps == 45
        epochs = [
            np.concatenate([batch for step in steps[i : i + 15] for batch in step]) for i in (0, 15, 30)
        ]
        for order in epochs:
            assert sorted(order) == list(range(100))
        assert not np.array_equal(epochs[0], epochs[1])

    def test_a_step_of_several_batches_takes_whole_ones_only(self) -> None:
        steps = list(plan(accumulate=3, whole=True).steps_after(0))
        assert len(steps) == 3 * (100 // 21)
        assert {len(batch) for step in steps for batch in step} == {7}
        assert {len(step) for step in steps} == {3}
        first_epoch = [sample for step in steps[:4] for batch in step for sample in batch]
        assert len(set(first_epoch)) == 84

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("done", [0, 1, 6, 7, 8, 20, 21])
    def test_what_is_left_is_the_rest_of_the_whole(self, done: int, accumulate: int) -> None:
        some = plan(accumulate=accumulate, whole=True, samples=7 * 7 * accumulate)
        whole, rest = list(some.steps_after(0)), list(some.steps_after(done))
        assert len(whole) == 21
        np.testing.assert_array_equal(np.array(rest).ravel(), np.array(whole[done:]).ravel())

    def test_the_order_is_that_of_the_seed(self) -> None:
        one, same, other = (np.concatenate([s[0] for s in plan(seed=s).steps_after(0)]) for s in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


class TestLearningRate:
    def test_it_falls_from_the_peak_to_zero_along_a_cosine(self) -> None:
        rates = [learning_rate(step, 100, 0.4, warmup=0) for step in range(100)]
        assert rates[0] == 0.4
        assert rates[50] == pytest.approx(0.2)
        assert 0 < rates[99] < 1e-3
        assert rates == sorted(rates, reverse=True)

    def test_a_warmup_rises_to_the_peak(self) -> None:
        rates = [learning_rate(step, 100, 0.4, warmup=4) for step in range(100)]
        assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
        assert rates[52] == pytest.approx(0.2)

    @pytest.mark.parametrize(("optimizer", "expected"), [("adamw", 1e-3), ("sgd", 5e-2)])
    def test_the_default_is_that_of_the_optimizer(
        self, tmp_path: Path, data: Path, optimizer: str, expected: float
    ) -> None:
        found = []
        finetune(make_bundle(tmp_path, nets.mlp(), Recipe(optimizer=optimizer)), data, log=found.append)
        assert found[0].learning_rate == expected

    def test_a_warmup_that_does_not_end_is_refused(self, tmp_path: Path, data: Path) -> None:
        bundle = make_bundle(tmp_path, nets.mlp())
        with pytest.raises(QatError) as caught:
            finetune(bundle, data, batch_size=25, warmup=4)
        assert (caught.value.code, caught.value.field) == (ErrorCode.ARGUMENT_INVALID, "warmup")


class TestAccumulation:
    """Fixed ranges: no scale's gradient depends on how the samples are put into batches."""

    @pytest.mark.parametrize("counts", ["executions", "optimizer_steps"])
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_a_step_of_several_batches_is_that_of_one_large_batch(
        self, tmp_path: Path, data: Path, optimizer: str, counts: str
    ) -> None:
        recipe = Recipe(optimizer=optimizer, ranges="fixed", step_counter=counts)
        bundle = make_bundle(tmp_path, nets.mlp(), recipe)
        trained = []
        for batch_size, accumulate in ((100, 1), (25, 4)):
            report = finetune(
                bundle, data, epochs=5, batch_size=batch_size, accumulate=accumulate, learning_rate=1e-2
            )
            assert report.steps == 5
            trained.append((report, read_checkpoint(report.checkpoint)))
        start = read_checkpoint(bundle / "checkpoint")
        (one, large), (other, accumulated) = trained
        for name in ("W1", "b1", "W2", "b2"):
            # AdamW makes a step of full size of a gradient that is all rounding.
            change = np.abs(large[name] - start[name]).max()
            np.testing.assert_allclose(accumulated[name], large[name], rtol=0, atol=1e-2 * change)
        assert other.losses == pytest.approx(one.losses, rel=1e-5)

    def test_more_than_there_is_is_refused(self, tmp_path: Path, data: Path) -> None:
        bundle = make_bundle(tmp_path, nets.mlp())
        with pytest.raises(QatError, match="there are 100") as caught:
            finetune(bundle, data, batch_size=SAMPLES // 4 + 1, accumulate=4)
        assert (caught.value.code, caught.value.field) == (ErrorCode.ARGUMENT_INVALID, "accumulate")
