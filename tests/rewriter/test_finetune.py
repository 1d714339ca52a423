"""The reference training loop: what it needs, what it writes, and that it trains."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.finalize import finalize
from rewriter.finetune import finetune
from rewriter.recipe import Recipe
from rewriter.training.checkpoint import read_checkpoint
from rewriter.training.runtime import open_session
from tests.rewriter.small_bundles import SAMPLES, make_bundle, write_samples
from tests.rewriter.training import nets


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path, nets.mlp(), Recipe(weight_bits=4, activation_bits=4))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "train.npz")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_it_lowers_the_loss_and_raises_the_accuracy(tmp_path: Path, bundle: Path, data: Path) -> None:
    x, labels = nets.batch(500, seed=9)
    np.savez(tmp_path / "test.npz", x=x, labels=labels)
    stages = []
    report = finetune(
        bundle,
        data,
        evaluation=tmp_path / "test.npz",
        epochs=30,
        learning_rate=1e-2,
        progress=lambda stage, fraction: stages.append((stage, fraction)),
    )
    assert report.steps == 30 * 4  # batches of 32, 32, 32 and 4
    assert len(report.losses) == 30
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss
    assert report.after.accuracy > report.before.accuracy + 0.2
    assert stages[0] == ("train", 0.0)
    assert stages[-1] == ("train", 1.0)
    assert "top-1" in report.summary()


def test_the_evaluation_is_that_of_the_whole_file_whatever_the_batch_size(
    tmp_path: Path, bundle: Path, data: Path
) -> None:
    session = open_session(bundle)
    session.module.eval()
    x, labels = nets.batch(SAMPLES)
    loss, scores = session.module(x, labels)
    report = finetune(bundle, data, evaluation=data, batch_size=7)
    assert report.before is not None
    np.testing.assert_allclose(report.before.loss, loss, rtol=1e-5)
    assert report.before.accuracy == (scores.argmax(axis=1) == labels).mean()


def test_the_bundle_itself_stays_as_it_was_prepared(bundle: Path, data: Path) -> None:
    before = digests(bundle)
    report = finetune(bundle, data)
    after = digests(bundle)
    assert report.checkpoint == bundle / "trained_checkpoint"
    assert after.pop("trained_checkpoint") != before["checkpoint"]
    assert after == before


def test_the_same_seed_trains_the_same_parameters_and_another_seed_others(
    tmp_path: Path, bundle: Path, data: Path
) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune(bundle, data, seed=seed, checkpoint_out=tmp_path / name)
        found.append(read_checkpoint(tmp_path / name))
    same = [all(np.array_equal(found[0][k], other[k]) for k in found[0]) for other in found[1:]]
    assert same == [True, False]


def test_training_can_go_on_from_a_checkpoint(tmp_path: Path, bundle: Path, data: Path) -> None:
    first = finetune(bundle, data, epochs=20, learning_rate=1e-2, checkpoint_out=tmp_path / "first")
    second = finetune(bundle, data, checkpoint=first.checkpoint, checkpoint_out=tmp_path / "second")
    assert first.losses[-1] < 0.7 * first.losses[0]
    assert second.losses[0] < 1.1 * first.losses[-1]


def test_a_model_with_a_fixed_batch_gets_batches_of_that_size(tmp_path: Path) -> None:
    nodes = [
        nets.node("Gemm", ["x", "W1", "b1"], "h"),
        nets.node("Reshape", ["h", "shape"], "r"),  # the batch size is in the graph: it cannot be dynamic
        nets.node("Gemm", ["r", "W2", "b2"], "y"),
    ]
    initializers = nets.weights() | {"shape": np.array([16, nets.HIDDEN], np.int64)}
    model = nets.model(nodes, initializers, {"y": [16, nets.CLASSES]}, inputs={"x": [16, nets.FEATURES]})
    bundle = make_bundle(tmp_path, model)
    x, labels = nets.batch(40)
    np.savez(tmp_path / "train.npz", x=x, labels=labels)

    report = finetune(bundle, tmp_path / "train.npz", evaluation=tmp_path / "train.npz", batch_size=5)

    assert report.steps == 2  # the 8 samples that are left do not fill a batch
    np.savez(tmp_path / "few.npz", x=x[:10], labels=labels[:10])
    with pytest.raises(QatError, match="batches of 16 samples") as caught:
        finetune(bundle, tmp_path / "few.npz")
    assert caught.value.code == ErrorCode.DATA_SHAPE_MISMATCH
    # Evaluation counts each of 40 samples once, in batches of 16.
    hits = report.before.accuracy * 40
    assert hits == round(hits)


def test_targets_train_a_regression(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, nets.mlp(), Recipe(loss="mse"))
    x, labels = nets.batch(SAMPLES)
    np.savez(tmp_path / "train.npz", x=x, targets=np.eye(nets.CLASSES)[labels])  # float64 is accepted
    report = finetune(bundle, tmp_path / "train.npz", evaluation=tmp_path / "train.npz", epochs=20)
    assert report.after is not None
    assert report.after.loss < report.before.loss
    assert report.after.accuracy is None


def arrays(**changed: np.ndarray | None) -> dict[str, np.ndarray]:
    x, labels = nets.batch(SAMPLES)
    merged = {"x": x, "labels": labels} | changed
    return {name: array for name, array in merged.items() if array is not None}


@pytest.mark.parametrize(
    ("content", "code", "field"),
    [
        (arrays(labels=None), ErrorCode.DATA_INPUT_MISSING, "labels"),
        (arrays(x=None), ErrorCode.DATA_INPUT_MISSING, "x"),
        (arrays(x=np.zeros((SAMPLES, 9), np.float32)), ErrorCode.DATA_SHAPE_MISMATCH, "x"),
        (arrays(labels=np.zeros(SAMPLES, np.float32)), ErrorCode.DATA_TYPE_MISMATCH, "labels"),
        (arrays(labels=np.zeros(SAMPLES - 1, np.int64)), ErrorCode.DATA_SHAPE_MISMATCH, None),
        (arrays(x=np.full((SAMPLES, 10), np.nan, np.float32)), ErrorCode.DATA_NOT_FINITE, "x"),
        (arrays(labels=np.full(SAMPLES, 4)), ErrorCode.DATA_LABEL_OUT_OF_RANGE, "labels"),
        (arrays(labels=np.full(SAMPLES, -1)), ErrorCode.DATA_LABEL_OUT_OF_RANGE, "labels"),
    ],
)
@pytest.mark.parametrize("role", ["train", "eval"])
def test_data_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, bundle: Path, data: Path, role: str, content: dict, code: ErrorCode, field: str | None
) -> None:
    np.savez(tmp_path / "bad.npz", **content)
    train, evaluation = (tmp_path / "bad.npz", None) if role == "train" else (data, tmp_path / "bad.npz")
    steps = []
    with pytest.raises(QatError) as caught:
        finetune(bundle, train, evaluation=evaluation, progress=lambda *state: steps.append(state))
    assert (caught.value.code, caught.value.field, caught.value.file) == (code, field, "bad.npz")
    assert steps == []
    assert not (bundle / "trained_checkpoint").exists()


def test_a_loss_that_is_not_finite_ends_the_training_and_writes_nothing(bundle: Path, data: Path) -> None:
    with pytest.raises(QatError, match="smaller learning rate") as caught:
        finetune(bundle, data, epochs=5, learning_rate=1e30)
    assert caught.value.code == ErrorCode.TRAINING_DIVERGED
    assert not (bundle / "trained_checkpoint").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: 0} for name in ("epochs", "batch_size", "accumulate")),
        *({name: 0} for name in ("save_every", "eval_every", "log_every")),
        *({name: -1} for name in ("seed", "warmup")),
        *({"learning_rate": rate} for rate in (0.0, -1e-3, 1e39, np.inf, np.nan)),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_meant_are_refused(bundle: Path, data: Path, arguments: dict) -> None:
    with pytest.raises(QatError) as caught:
        finetune(bundle, data, **arguments)
    assert (caught.value.code, caught.value.field) == (ErrorCode.ARGUMENT_INVALID, *arguments)


def test_a_checkpoint_that_cannot_be_written_is_said_before_training(bundle: Path, data: Path) -> None:
    steps = []
    with pytest.raises(QatError) as caught:
        finetune(bundle, data, checkpoint_out=bundle, progress=lambda *state: steps.append(state))
    assert caught.value.code == ErrorCode.OUTPUT_UNWRITABLE
    assert steps == []


def test_a_damaged_model_of_the_bundle_is_named(bundle: Path, data: Path) -> None:
    (bundle / "eval_model.onnx").write_bytes(b"garbage")
    with pytest.raises(QatError) as caught:
        finetune(bundle, data)
    assert (caught.value.code, caught.value.file) == (ErrorCode.BUNDLE_INVALID, "eval_model.onnx")


def test_what_is_no_bundle_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(QatError) as caught:
        finetune(tmp_path / "nowhere", data)
    assert caught.value.code == ErrorCode.BUNDLE_INVALID


@pytest.mark.parametrize(("ranges", "learning_rate"), [("learned", 1e3), ("learned", 1e30), ("fixed", 3e38)])
def test_a_last_step_that_diverges_writes_nothing(
    tmp_path: Path, data: Path, ranges: str, learning_rate: float
) -> None:
    bundle = make_bundle(tmp_path, nets.mlp(), Recipe(ranges=ranges))
    before = digests(bundle)
    with pytest.raises(QatError) as caught:
        finetune(bundle, data, batch_size=SAMPLES, learning_rate=learning_rate)
    assert caught.value.code == ErrorCode.TRAINING_DIVERGED
    assert digests(bundle) == before


def test_a_run_is_resumed_or_starts_from_a_checkpoint(bundle: Path, data: Path) -> None:
    with pytest.raises(QatError) as caught:
        finetune(bundle, data, resume=True, checkpoint=bundle / "checkpoint")
    assert (caught.value.code, caught.value.field) == (ErrorCode.ARGUMENT_INVALID, "checkpoint")


def test_both_files_that_it_writes_are_checked_before_training(bundle: Path, data: Path) -> None:
    for arguments, code in (
        ({"training_state": bundle / "checkpoint"}, ErrorCode.OUTPUT_EXISTS),
        ({"training_state": bundle}, ErrorCode.OUTPUT_UNWRITABLE),
        ({"training_state": bundle / "trained_checkpoint"}, ErrorCode.ARGUMENT_INVALID),
    ):
        with pytest.raises(QatError) as caught:
            finetune(bundle, data, log=lambda record: pytest.fail("it has trained"), **arguments)
        assert caught.value.code == code


def test_a_checkpoint_of_another_bundle_with_the_same_shapes_is_refused(
    tmp_path: Path, bundle: Path, data: Path
) -> None:
    trained = finetune(make_bundle(tmp_path / "other", nets.mlp(), Recipe(weight_bits=8)), data).checkpoint
    for use in (
        lambda: finetune(bundle, data, checkpoint=trained),
        lambda: finalize(bundle, tmp_path / "int8.onnx", checkpoint=trained),
    ):
        with pytest.raises(QatError, match="another bundle") as caught:
            use()
        assert (caught.value.code, caught.value.file) == (ErrorCode.CHECKPOINT_INVALID, trained.name)
