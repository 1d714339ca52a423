"""An interrupted run goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.finalize import finalize
from rewriter.finetune import FinetuneReport, finetune
from rewriter.recipe import Recipe
from rewriter.training.runtime import open_session
from tests.rewriter.small_bundles import (
    make_bundle,
    new_process,
    require_same_parameters,
    run_script,
    stop_after,
    write_samples,
)
from tests.rewriter.training import nets

# 15 steps an epoch, the last one of 2 samples.
ARGUMENTS = {"epochs": 2, "batch_size": 7, "learning_rate": 1e-2, "warmup": 3, "seed": 5}
RECIPES = {
    "adamw": Recipe(weight_bits=4, activation_bits=4),
    "sgd": Recipe(optimizer="sgd", weight_bits=4, activation_bits=4),
    # Everything that the training graph itself keeps, and changes on its way.
    "stateful": Recipe(quant_delay=15, freeze_bn_delay=22, ranges="moving_average"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "train.npz")


@pytest.fixture(params=RECIPES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_bundle(tmp_path, nets.batch_norm_mlp(), RECIPES[request.param])


@pytest.fixture
def adamw(tmp_path: Path) -> Path:
    return make_bundle(tmp_path, nets.mlp(), RECIPES["adamw"])


def interrupted(bundle: Path, data: Path, steps: int, **arguments: object) -> Path:
    """The file from which a run goes on that was stopped after so many steps."""
    with pytest.raises(QatError) as caught:
        finetune(bundle, data, stop=stop_after(steps), **(ARGUMENTS | arguments))
    assert caught.value.code == ErrorCode.TRAINING_INTERRUPTED
    assert f"after step {steps} of" in caught.value.message
    assert not (bundle / "trained_checkpoint").exists()
    return bundle / "training_state"


def uninterrupted(bundle: Path, data: Path, **arguments: object) -> FinetuneReport:
    return finetune(bundle, data, checkpoint_out=bundle.parent / "whole", **(ARGUMENTS | arguments))


def test_stopped_after_any_step_it_comes_to_the_same_result(bundle: Path, data: Path) -> None:
    whole = uninterrupted(bundle, data)
    for steps in (1, 14, 15, 16, 29, 30):
        state = interrupted(bundle, data, steps)
        report = finetune(bundle, data, resume=True, **ARGUMENTS)
        require_same_parameters(report.checkpoint, whole.checkpoint)
        assert (report.losses, report.steps, report.resumed_after) == (whole.losses, 30, steps)
        assert not state.exists()  # there is nothing left to resume
        report.checkpoint.unlink()


@pytest.mark.parametrize("steps", [4, 15])
def test_in_a_new_process_it_comes_to_the_same_result(bundle: Path, data: Path, steps: int) -> None:
    whole = uninterrupted(bundle, data)
    interrupted(bundle, data, steps)
    script = (
        "import sys; from pathlib import Path; from rewriter import finetune\n"
        f"finetune(Path(sys.argv[1]), Path(sys.argv[2]), resume=True, **{ARGUMENTS!r})"
    )
    run_script(script, bundle, data)
    require_same_parameters(bundle / "trained_checkpoint", whole.checkpoint)


def test_it_can_be_stopped_again_and_again(adamw: Path, data: Path) -> None:
    whole = uninterrupted(adamw, data, accumulate=2)
    interrupted(adamw, data, 3, accumulate=2)
    with pytest.raises(QatError, match="after step 8 of 14"):
        finetune(adamw, data, resume=True, stop=stop_after(5), accumulate=2, **ARGUMENTS)
    report = finetune(adamw, data, resume=True, accumulate=2, **ARGUMENTS)
    require_same_parameters(report.checkpoint, whole.checkpoint)


def test_it_is_evaluated_as_without_an_interruption(adamw: Path, data: Path) -> None:
    """And stopping in the midst of an evaluation is stopping after the step before."""
    whole = uninterrupted(adamw, data, evaluation=data)
    # 15 batches before the first step, 14 steps, and the third batch of the evaluation after the next.
    with pytest.raises(QatError, match="after step 15 of 30"):
        finetune(adamw, data, evaluation=data, stop=stop_after(15 + 14 + 3), **ARGUMENTS)
    report = finetune(adamw, data, resume=True, evaluation=data, **ARGUMENTS)
    require_same_parameters(report.checkpoint, whole.checkpoint)
    assert (report.before, report.after) == (whole.before, whole.after)


def test_a_run_that_is_killed_goes_on_from_what_it_saved_last(adamw: Path, data: Path) -> None:
    whole = uninterrupted(adamw, data)

    def die(record: object) -> None:
        if record.step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(adamw, data, save_every=8, log=die, log_every=1, **ARGUMENTS)
    report = finetune(adamw, data, resume=True, **ARGUMENTS)
    assert report.resumed_after == 16
    require_same_parameters(report.checkpoint, whole.checkpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_command_and_it_can_be_resumed(adamw: Path, data: Path, number: int) -> None:
    def command(*more: str) -> list[object]:
        options = ["--epochs", "150", "--batch-size", "5", "--save-every", "100", *more]
        return ["-m", "typer", "rewriter.cli", "run", "finetune", adamw, "--data", data, *options]

    whole = finetune(adamw, data, epochs=150, batch_size=5, checkpoint_out=adamw.parent / "whole")
    process = new_process(*command())
    deadline = time.monotonic() + 60
    while not (adamw / "training_state").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate()

    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
    if number != signal.SIGKILL:
        assert len(stderr.splitlines()) == 1
        assert "training_interrupted" in stderr
    process = new_process(*command("--resume"))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "3000 steps" in stdout
    assert "before it was resumed" in stdout
    require_same_parameters(adamw / "trained_checkpoint", whole.checkpoint)


STOCK = """
import sys
import numpy as np
from rewriter import training_api

bundle, start, first, last, out, data = sys.argv[1:]
api = training_api()
state = api.CheckpointState.load_checkpoint(start)
module = api.Module(f"{bundle}/training_model.onnx", state, f"{bundle}/eval_model.onnx", device="cpu")
optimizer = api.Optimizer(f"{bundle}/optimizer_model.onnx", module)
optimizer.set_learning_rate(1e-2)
samples = np.load(data)
for step in range(int(first), int(last)):
    module.train()
    chosen = slice(5 * step % 100, 5 * step % 100 + 5)
    module(samples["x"][chosen], samples["labels"][chosen])
    optimizer.step()
    module.lazy_reset_grad()
    api.CheckpointState.save_checkpoint(state, f"{out}{step + 1}", include_optimizer_state=True)
"""


def test_a_stock_loop_saved_with_its_optimizer_goes_on_in_a_new_process(
    tmp_path: Path, bundle: Path, data: Path
) -> None:
    run_script(STOCK, bundle, bundle / "checkpoint", 0, 27, tmp_path / "whole", data)
    run_script(STOCK, bundle, tmp_path / "whole17", 17, 27, tmp_path / "resumed", data)
    require_same_parameters(tmp_path / "resumed27", tmp_path / "whole27")


def test_the_first_step_after_loading_does_not_add_to_gradients_from_before(
    tmp_path: Path, adamw: Path
) -> None:
    """What was accumulated is in no checkpoint: a run is saved between two optimizer steps."""
    x, labels = nets.batch(8)
    session = open_session(adamw)
    session.module.train()
    session.module(x, labels)
    session.save(tmp_path / "amid", optimizer_state=True)
    gradient = session.state.parameters["W1"].grad.copy()
    again = open_session(adamw, tmp_path / "amid")
    again.module.train()
    again.module(x, labels)
    np.testing.assert_array_equal(again.state.parameters["W1"].grad, gradient)


def test_the_resumable_checkpoint_can_be_deployed(tmp_path: Path, adamw: Path, data: Path) -> None:
    state = interrupted(adamw, data, 20)
    finalize(adamw, tmp_path / "early.onnx", checkpoint=state)
    finalize(adamw, tmp_path / "prepared.onnx")  # by default it is not taken
    finalize(adamw, tmp_path / "first.onnx", checkpoint=adamw / "checkpoint")
    early, prepared, first = (
        (tmp_path / f"{name}.onnx").read_bytes() for name in ("early", "prepared", "first")
    )
    assert early != prepared == first


def test_a_new_run_takes_the_weights_of_a_checkpoint_and_no_moments(
    tmp_path: Path, adamw: Path, data: Path
) -> None:
    state = interrupted(adamw, data, 20)
    open_session(adamw, state).save(tmp_path / "weights")
    for start, out in ((state, "first"), (tmp_path / "weights", "second")):
        finetune(adamw, data, checkpoint=start, checkpoint_out=tmp_path / out)
    require_same_parameters(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("epochs", {"epochs": 3}),
        ("batch_size", {"batch_size": 8}),
        ("accumulate", {"accumulate": 2}),
        ("learning_rate", {"learning_rate": 2e-2}),
        ("learning_rate", {"learning_rate": None}),
        ("warmup", {"warmup": 0}),
        ("seed", {"seed": 6}),
        ("data", {}),
    ],
)
def test_a_run_goes_on_with_the_same_data_and_arguments_only(
    tmp_path: Path, adamw: Path, data: Path, field: str, changed: dict
) -> None:
    state = interrupted(adamw, data, 5)
    before = state.read_bytes()
    if field == "data":
        data = write_samples(tmp_path / "other.npz", seed=2)
    with pytest.raises(QatError) as caught:
        finetune(adamw, data, resume=True, **(ARGUMENTS | changed))
    assert (caught.value.code, caught.value.field) == (ErrorCode.RESUME_MISMATCH, field)
    assert state.read_bytes() == before


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path: Path, adamw: Path, data: Path) -> None:
    """Bundles that differ in nothing else have the same training model."""
    state = interrupted(adamw, data, 5)
    other = make_bundle(tmp_path / "sgd", nets.mlp(), RECIPES["sgd"])
    with pytest.raises(QatError) as caught:
        finetune(other, data, resume=True, training_state=state, **ARGUMENTS)
    assert (caught.value.code, caught.value.field) == (ErrorCode.RESUME_MISMATCH, "optimizer")


def test_a_run_does_not_go_on_with_another_bundle(tmp_path: Path, adamw: Path, data: Path) -> None:
    state = interrupted(adamw, data, 5)
    other = make_bundle(tmp_path / "other", nets.mlp(), Recipe(weight_bits=8))
    with pytest.raises(QatError, match="another bundle") as caught:
        finetune(other, data, resume=True, training_state=state, **ARGUMENTS)
    assert caught.value.code == ErrorCode.CHECKPOINT_INVALID


@pytest.mark.parametrize("content", [None, "plain"])
def test_where_no_run_was_interrupted_there_is_nothing_to_resume(
    adamw: Path, data: Path, content: str | None
) -> None:
    if content == "plain":
        open_session(adamw).save(adamw / "training_state", optimizer_state=True)
    with pytest.raises(QatError) as caught:
        finetune(adamw, data, resume=True, **ARGUMENTS)
    assert (caught.value.code, caught.value.file) == (ErrorCode.RESUME_UNAVAILABLE, "training_state")


def test_a_damaged_state_is_named(adamw: Path, data: Path) -> None:
    state = interrupted(adamw, data, 5)
    state.write_bytes(state.read_bytes()[:-300])
    for arguments in ({"resume": True}, {"checkpoint": state}):
        with pytest.raises(QatError) as caught:
            finetune(adamw, data, **arguments, **ARGUMENTS)
        assert (caught.value.code, caught.value.file) == (ErrorCode.CHECKPOINT_INVALID, "training_state")


def test_a_finished_run_leaves_what_another_one_was_interrupted_with(adamw: Path, data: Path) -> None:
    state = interrupted(adamw, data, 5)
    before = state.read_bytes()
    finetune(adamw, data)
    assert state.read_bytes() == before


def test_moments_of_another_optimizer_are_refused(tmp_path: Path, adamw: Path) -> None:
    """onnxruntime's own loop takes them, and fails where AdamW misses one."""
    sgd = make_bundle(tmp_path / "sgd", nets.mlp(), RECIPES["sgd"])
    session = open_session(sgd)
    session.save(tmp_path / "moments", optimizer_state=True)
    with pytest.raises(QatError) as caught:
        open_session(adamw, tmp_path / "moments")
    assert caught.value.code == ErrorCode.CHECKPOINT_INVALID
