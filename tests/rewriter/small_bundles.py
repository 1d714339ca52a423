"""Bundles and samples that train in milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

import rewriter
from rewriter.prepare import prepare
from rewriter.recipe import Recipe
from rewriter.training.checkpoint import read_checkpoint
from tests.rewriter.training import nets

SAMPLES = 100

# Environment of a process that imports the modules of this checkout whatever its working directory is.
THIS_CHECKOUT = {"PYTHONPATH": str(Path(rewriter.__file__).parents[1])}


def make_bundle(folder: Path, model: ir.Model, recipe: Recipe | None = None) -> Path:
    """A bundle prepared with a few samples."""
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / "float.onnx")
    shape = [dim if isinstance(dim, int) else 64 for dim in model.graph.inputs[0].shape]
    x = np.random.default_rng(0).standard_normal((64, *shape[1:])).astype(np.float32)
    np.savez(folder / "calibration.npz", x=x)
    prepare(folder / "float.onnx", folder / "bundle", recipe=recipe, calibration=folder / "calibration.npz")
    return folder / "bundle"


def write_samples(file: Path, count: int = SAMPLES, seed: int = 1) -> Path:
    """Samples for `nets.mlp`."""
    x, labels = nets.batch(count, seed)
    np.savez(file, x=x, labels=labels)
    return file


def require_same_parameters(one: Path, other: Path) -> None:
    """To the bit, the training graph's own state among them."""
    found, expected = read_checkpoint(one), read_checkpoint(other)
    assert found.keys() == expected.keys()
    different = [name for name in found if found[name].tobytes() != expected[name].tobytes()]
    assert different == []


def stop_after(steps: int) -> Callable[[], bool]:
    """Asked after each step, it says so after this many."""
    asked = iter(range(1, steps + 1))
    return lambda: next(asked, steps) == steps


def new_process(*arguments: object) -> subprocess.Popen[str]:
    """Python with these arguments; SIGINT ends it, even where the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **THIS_CHECKOUT},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_script(script: str, *arguments: object) -> None:
    """In a new process; it must not fail."""
    process = new_process("-c", script, *arguments)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
