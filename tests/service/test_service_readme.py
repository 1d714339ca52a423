"""The commands of README.md's HTTP API, pasted from top to bottom, make an int8 model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from servers import absent
from service_helpers import free_port

from examples.digits import write_digits

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
SECTION = README[README.index("\n## HTTP API") : README.index("\n### Large uploads")]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)


def test_the_commands_lead_from_a_model_to_its_int8_model(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for program in ("curl", "unzip"):
        if shutil.which(program) is None:
            absent(program, FileNotFoundError(f"there is no {program}"))
    shutil.copy(real_model("mnist-conv"), tmp_path / "model.onnx")
    write_digits(tmp_path / "data")
    serve, *commands = BLOCKS
    # The server in the background and on a port that is free; the rest as it is written there.
    script = f"""
    set -euo pipefail
    {serve.strip()} 2>serve.log & trap "kill $!" EXIT
    curl -sS --retry 60 --retry-delay 1 --retry-connrefused -o ready.json http://127.0.0.1:8000/health/ready
    {"".join(commands)}
    """
    with subprocess.Popen(
        ["bash", "-c", script.replace("8000", str(free_port()))],
        cwd=tmp_path,
        env={**os.environ, "PATH": PATH, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    onnx.checker.check_model(tmp_path / "model.int8.onnx")


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no clone")
def test_what_the_commands_write_is_ignored_in_a_clone() -> None:
    for path in ("data/service/lock", "data/train.npz", "model.onnx", "bundle/manifest.json", "bundle.zip"):
        subprocess.run(["git", "check-ignore", "--quiet", path], cwd=REPOSITORY, check=True)
