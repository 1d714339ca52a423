"""The commands on good input: what they do and print. (Bad input: test_bad_input.py.)"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

import rewriter
from examples.models import model_path
from rewriter.cli import app
from tests.rewriter.small_bundles import THIS_CHECKOUT, require_same_parameters

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


def test_finetune_prints_a_line_a_record_and_logs_them_for_a_machine(folder: Path) -> None:
    run("prepare", "model.onnx", "-o", "bundle", "--calibration", "data.npz")
    options = ("--eval", "data.npz", "--epochs", "3", "--batch-size", "5", "--log-every", "6")
    trained = run("finetune", "bundle", "--data", "data.npz", *options, "--log", "log.jsonl")
    lines = [line.split() for line in trained.stdout.splitlines() if line.startswith("epoch")]
    assert [line[3] for line in lines if line[4] == "loss"] == ["1/12", "4/12", "6/12", "8/12", "12/12"]
    assert [line[3] for line in lines if line[4] == "evaluation"] == ["0/12", "4/12", "8/12", "12/12"]
    assert all(line[-1] == "quantized" for line in lines)
    logged = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [f"{record['step']}/{record['steps']}" for record in logged] == [line[3] for line in lines]
    assert {record["event"] for record in logged} == {"step", "evaluation"}
    evaluations = [record for record in logged if record["event"] == "evaluation"]
    assert all(0 <= record["accuracy"] <= 1 for record in evaluations)


def test_the_options_of_finetune_are_those_of_the_library(folder: Path) -> None:
    run("prepare", "model.onnx", "-o", "bundle", "--calibration", "data.npz")
    run(
        *("finetune", "bundle", "--data", "data.npz", "-o", "cli", "--checkpoint", "bundle/checkpoint"),
        *("--epochs", "4", "--batch-size", "3", "--accumulate", "2", "--lr", "0.01", "--warmup", "2"),
        *("--seed", "7", "--save-every", "2", "--state", "state"),
    )
    report = rewriter.finetune(
        Path("bundle"),
        Path("data.npz"),
        checkpoint_out=Path("library"),
        epochs=4,
        batch_size=3,
        accumulate=2,
        learning_rate=0.01,
        warmup=2,
        seed=7,
    )
    assert report.steps == 4 * 3
    require_same_parameters(Path("cli"), Path("library"))
    assert not Path("state").exists()  # it was done with


def test_a_log_that_cannot_be_written_is_said_before_training(folder: Path) -> None:
    run("prepare", "model.onnx", "-o", "bundle")
    result = CliRunner().invoke(app, ["finetune", "bundle", "--data", "data.npz", "--log", "no/log"])
    assert result.exit_code == 1
    assert "output_unwritable" in result.stderr
    assert not Path("bundle/trained_checkpoint").exists()


def on_a_terminal(*arguments: str, everything: bool = False) -> bytes:
    """What a command shows on a terminal that its standard error is, or everything of it."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "typer", "rewriter.cli", "run", *arguments],
        stdout=theirs if everything else subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, **THIS_CHECKOUT, "TERM": "xterm", "COLUMNS": "120"},
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
    return shown


def test_progress_is_shown_on_a_terminal(folder: Path) -> None:
    shown = on_a_terminal("prepare", "model.onnx", "-o", "bundle")
    for stage in (b"load", b"calibrate", b"write", b"100%"):
        assert stage in shown


def test_on_a_terminal_finetune_shows_the_newest_step_and_every_evaluation(folder: Path) -> None:
    run("prepare", "model.onnx", "-o", "bundle", "--calibration", "data.npz")
    options = ("--data", "data.npz", "--eval", "data.npz", "--epochs", "3", "--batch-size", "5")
    shown = on_a_terminal("finetune", "bundle", *options, everything=True)
    assert shown.count(b"evaluation  loss") == 4
    assert b"12/12  loss" in shown
    assert b"step  1/12  loss" not in shown  # no line of its own
    assert b"after training" in shown


def test_a_crash_of_onnxruntime_is_shown_with_the_python_stack(tmp_path: Path) -> None:
    """ppocr4-rec wants samples 48 pixels high; with 32 onnxruntime 1.19 divides an integer by zero."""
    np.savez(tmp_path / "data.npz", x=np.ones((1, 3, 32, 160), np.float32))
    # On one core, so with one thread: where two crash at once, neither's report is whole.
    one_core = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"{one_core}; from rewriter.cli import app; app()"
    arguments = ["prepare", str(model_path("ppocr4-rec")), "-o", "bundle", "--calibration", "data.npz"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, **THIS_CHECKOUT},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGFPE
    assert "Floating point exception" in ended.stderr
    assert "rewriter/calibration" in ended.stderr
    assert not (tmp_path / "bundle").exists()
