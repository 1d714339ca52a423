"""The commands on good input: what they do and print. (Bad input: test_bad_input.py.)"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

import rewriter
from rewriter.cli import app

SAMPLES = 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With model.onnx, a linear classifier of 3 classes, and data.npz for it; the current directory."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((4, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="schön")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "model.onnx",
    )
    x = rng.standard_normal((SAMPLES, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=np.arange(SAMPLES) % 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return result


def test_the_three_commands_in_a_row(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepared = run("prepare", "model.onnx", "-o", "bundle", "--calibration", "data.npz")
    assert prepared.stdout.startswith("bundle: 1 nodes quantized with 1 weight and 1 activation quantizers")
    assert prepared.stderr == ""
    trained = run("finetune", "bundle", "--data", "data.npz", "--eval", "data.npz", "--epochs", "2")
    assert "2 steps" in trained.stdout
    assert "after training: loss" in trained.stdout
    finalized = run("finalize", "bundle", "-o", "int8.onnx", "--verify", "data.npz")
    assert finalized.stdout.startswith("int8.onnx: ")
    assert f"{SAMPLES} samples: same top-1" in finalized.stdout
    # Nothing of onnxruntime's own log, which goes past Python.
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "data.npz", "int8.onnx", "model.onnx"]


def test_warnings_go_to_standard_error(folder: Path) -> None:
    prepared = run("prepare", "model.onnx", "-o", "bundle")
    assert "warning: 1 of 1 activation quantizers are uncalibrated" in prepared.stderr
    assert "warning" not in prepared.stdout


def test_a_setting_wins_over_the_recipe_file(folder: Path) -> None:
    # UTF-8 whatever the locale says.
    content = {"weight_bits": 4, "activation_bits": 4, "overrides": [{"match": "schön", "symmetric": True}]}
    Path("recipe.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    run(
        *("prepare", "model.onnx", "-o", "bundle", "--recipe", "recipe.json"),
        *("--set", "weight_bits=6", "--set", "calibration.method=percentile", "--set", "loss=mse"),
    )
    recipe = rewriter.read_manifest(folder / "bundle").recipe
    assert (recipe.weight_bits, recipe.activation_bits) == (6, 4)
    assert (recipe.calibration.method, recipe.calibration.percentile) == ("percentile", 99.99)
    assert recipe.loss == "mse"
    assert recipe.overrides[0].match == "schön"


def test_finetune_writes_what_finalize_takes_by_default(folder: Path) -> None:
    run("prepare", "model.onnx", "-o", "bundle", "--calibration", "data.npz")
    run("finalize", "bundle", "-o", "before.onnx")
    run("finetune", "bundle", "--data", "data.npz", "--lr", "0.1", "--batch-size", "5")
    run("finalize", "bundle", "-o", "after.onnx")
    run("finalize", "bundle", "-o", "prepared.onnx", "--checkpoint", "bundle/checkpoint")
    before, after, prepared = (Path(f"{name}.onnx").read_bytes() for name in ("before", "after", "prepared"))
    assert before == prepared != after


def test_progress_is_shown_on_a_terminal(folder: Path) -> None:
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "typer", "rewriter.cli", "run", "prepare", "model.onnx", "-o", "bundle"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # how a terminal says that the other side has closed it
        pass
    finally:
        os.close(terminal)
    assert process.wait() == 0, shown
    for stage in (b"load", b"calibrate", b"write", b"100%"):
        assert stage in shown
