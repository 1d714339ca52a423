"""prepare as a whole: its files, and what the manifest says of them and of their origin."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import rewriter
from rewriter import load as load_module
from tests.rewriter.training import nets

FILES = ["checkpoint", "eval_model.onnx", "optimizer_model.onnx", "qat_model.onnx", "training_model.onnx"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(nets.mlp(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_manifest_describes_the_files_and_their_origin(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", x=nets.batch(16)[0])
    manifest = rewriter.prepare(model, tmp_path / "bundle", calibration=tmp_path / "samples.npz")
    assert [file.name for file in manifest.files] == FILES
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == sorted([*FILES, "manifest.json"])
    for file in manifest.files:
        path = tmp_path / "bundle" / file.name
        assert (file.sha256, file.bytes) == (sha256(path), path.stat().st_size)
    assert (manifest.source.sha256, manifest.source.bytes) == (sha256(model), model.stat().st_size)
    assert manifest.source.external_data == ()
    assert manifest.calibration is not None
    assert manifest.calibration.sha256 == sha256(tmp_path / "samples.npz")
    assert rewriter.read_manifest(tmp_path / "bundle") == manifest


def test_the_source_is_the_model_with_its_external_data(tmp_path: Path) -> None:
    proto = ir.to_proto(nets.mlp())
    onnx.save(
        proto,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
    )
    (tmp_path / "unrelated.bin").write_bytes(b"not part of the model")
    source = rewriter.prepare(tmp_path / "model.onnx", tmp_path / "bundle").source
    assert [file.name for file in source.external_data] == ["W1", "W2", "b1", "b2"]
    for file in source.external_data:
        path = tmp_path / file.name
        assert (file.sha256, file.bytes) == (sha256(path), path.stat().st_size)


def test_weights_too_large_for_a_file_are_listed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "EXTERNAL_DATA_THRESHOLD", 0)
    manifest = rewriter.prepare(model, tmp_path / "bundle")
    assert [file.name for file in manifest.files] == sorted([*FILES, "qat_model.onnx.data"])
    rewriter.finalize(tmp_path / "bundle", tmp_path / "int8.onnx")


def test_the_stages_come_in_order(model: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, float]] = []
    rewriter.prepare(model, tmp_path / "bundle", progress=lambda *state: stages.append(state))
    assert list(dict(stages)) == ["load", "normalize", "calibrate", "write"]
    for stage in dict(stages):
        shares = [share for name, share in stages if name == stage]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


_WITHOUT_ROOM = """
import pathlib, resource, rewriter
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    rewriter.prepare(pathlib.Path("model.onnx"), pathlib.Path("bundle"))
except rewriter.QatError as error:
    print(error.code, type(error.__cause__).__name__, error.__cause__.errno)
"""


# Python and onnxruntime write different files of the bundle, and say differently that one cannot be written.
@pytest.mark.parametrize("limit", [500, 1000, 3000, 6000])
def test_no_room_is_an_error_with_a_code(model: Path, tmp_path: Path, limit: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    before = sorted(tmp_path.iterdir())
    script = _WITHOUT_ROOM.format(limit=limit)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["output_unwritable", "OSError", "27"], done.stderr
    assert sorted(tmp_path.iterdir()) == before
