"""Checkpoints and the sessions that load them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rewriter import bundle as bundles
from rewriter.errors import ErrorCode, QatError
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.checkpoint import latest_checkpoint, read_checkpoint
from rewriter.training.runtime import TrainingSession, open_session
from tests.rewriter.training import nets


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_training_artifacts(nets.quantized_mlp(), Recipe(), tmp_path)
    return tmp_path


def train(session: TrainingSession, steps: range) -> list[float]:
    losses = []
    for step in steps:
        session.module.train()
        losses.append(float(session.module(*nets.batch(seed=step))))
        session.optimizer.step()
        session.module.lazy_reset_grad()
    return losses


def test_a_new_checkpoint_holds_the_weights_of_the_model_and_zeros(bundle: Path) -> None:
    """Multipliers and offsets of ranges, and the number of steps."""
    found = read_checkpoint(bundle / bundles.CHECKPOINT)
    for name, value in nets.weights().items():
        np.testing.assert_array_equal(found.pop(name), value)
    multipliers = [f"{tensor}_scale.log_multiplier" for tensor in ("W1", "W2", "r", "x")]
    assert sorted(found) == sorted([*multipliers, "x_zero_point.offset", "quantization_step"])
    assert {value.shape for value in found.values()} == {(8,), (4,), ()}
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_resumes_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    write_training_artifacts(nets.quantized_mlp(), Recipe(optimizer=optimizer), tmp_path)
    straight = open_session(tmp_path)
    expected = train(straight, range(12))
    straight.save(tmp_path / "straight")

    interrupted = open_session(tmp_path)
    found = train(interrupted, range(5))
    interrupted.save(tmp_path / "half", optimizer_state=True)
    resumed = open_session(tmp_path, tmp_path / "half")
    found += train(resumed, range(5, 12))
    resumed.save(tmp_path / "resumed")

    assert found == expected
    a, b = read_checkpoint(tmp_path / "straight"), read_checkpoint(tmp_path / "resumed")
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])


def test_the_trained_checkpoint_is_the_latest(bundle: Path) -> None:
    assert latest_checkpoint(bundle) == bundle / "checkpoint"
    open_session(bundle).save(bundle / "trained_checkpoint")
    assert latest_checkpoint(bundle) == bundle / "trained_checkpoint"


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"\x08\x00\x00\x00ODTC" + bytes(64)])
def test_what_is_no_checkpoint_is_refused(bundle: Path, content: bytes | None) -> None:
    path = bundle / "other"
    if content is not None:
        path.write_bytes(content)
    for load in (read_checkpoint, lambda p: open_session(bundle, p)):
        with pytest.raises(QatError) as caught:
            load(path)
        assert (caught.value.code, caught.value.file) == (ErrorCode.CHECKPOINT_INVALID, "other")


def test_a_checkpoint_of_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_training_artifacts(nets.mlp(), Recipe(), other)  # the same without quantizers
    for folder, checkpoint in ((bundle, other / "checkpoint"), (other, bundle / "checkpoint")):
        with pytest.raises(QatError, match="another bundle") as caught:
            open_session(folder, checkpoint)
        assert caught.value.code == ErrorCode.CHECKPOINT_INVALID


def test_cuda_without_a_cuda_build_is_an_error_that_says_what_to_install(bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert open_session(bundle, device="cuda")
        return
    with pytest.raises(QatError, match=r"\[cuda\]") as caught:
        open_session(bundle, device="cuda")
    assert (caught.value.code, caught.value.field) == (ErrorCode.TRAINING_RUNTIME_MISSING, "device")


_WITHOUT_THE_TRAINING_BUILD = """
import sys, types
import onnxruntime.capi
sys.modules["onnxruntime.capi._pybind_state"] = types.ModuleType("inference only")
onnxruntime.capi._pybind_state = sys.modules["onnxruntime.capi._pybind_state"]
from rewriter.errors import QatError
from rewriter import training_api
try:
    training_api()
except QatError as error:
    print(error.code)
"""

_PACKAGE_FIRST = """
import pathlib, sys, types
import onnxruntime
package = sys.modules["onnxruntime.training"] = types.ModuleType("onnxruntime.training")
package.__path__ = [str(pathlib.Path(onnxruntime.__file__).parent / "training")]
from onnxruntime.training.api import Module
import rewriter
assert rewriter.training_api().Module is Module
print(sys.modules["onnxruntime.training"] is package)
"""


@pytest.mark.parametrize(
    ("script", "says"),
    [(_WITHOUT_THE_TRAINING_BUILD, "training_runtime_missing"), (_PACKAGE_FIRST, "True")],
    ids=["without the training build", "package imported before"],
)
def test_importing_the_training_api(script: str, says: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == says


def test_a_checkpoint_whose_names_are_damaged_is_refused(bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes((bundle / "checkpoint").read_bytes().replace(b"W1", b"\xbf1"))
    for load in (read_checkpoint, lambda path: open_session(bundle, path)):
        with pytest.raises(QatError) as caught:
            load(damaged)
        assert (caught.value.code, caught.value.file) == (ErrorCode.CHECKPOINT_INVALID, "damaged")
