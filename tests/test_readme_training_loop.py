"""The training loop in README.md trains a bundle with nothing of ours and without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import rewriter
from examples.digits import write_digits

README = (Path(__file__).parents[1] / "README.md").read_text()

PREPARATION = """
import sys
sys.modules["rewriter"] = sys.modules["torch"] = None  # importing either is an error

import numpy as np
digits = np.load("train.npz")
images, labels = digits["Input3"], digits["labels"]
batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 640, 64)]
"""
COMPARISON = """
after = CheckpointState.load_checkpoint("bundle/trained_checkpoint")
before = CheckpointState.load_checkpoint("bundle/checkpoint")
changed = [n for n, p in after.parameters if not np.array_equal(p.data, before.parameters[n].data)]
print(float(loss), len(changed))
"""


def test_the_loop_runs_alone_and_changes_the_checkpoint(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    write_digits(tmp_path)
    rewriter.prepare(real_model("mnist-conv"), tmp_path / "bundle", calibration=tmp_path / "calibration.npz")
    loop = next(block for block in README.split("```") if "CheckpointState" in block).removeprefix("python\n")
    result = subprocess.run(
        [sys.executable, "-c", PREPARATION + loop + COMPARISON],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loss, changed = result.stdout.split()[-2:]
    assert 0 < float(loss) < 0.5
    assert int(changed) > 4
