"""examples/service: each example does what it says, against the real service."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import mlflow
import numpy as np
import onnx
import pytest
import yaml

from examples.digits import load_digits
from examples.models import model_path

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "service"
WORKFLOW = EXAMPLES / "github-actions.yml"
COMMAND = "from service.cli import app; app(prog_name='onnx-qat')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `onnx-qat serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    data = tmp_path_factory.mktemp("service")
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--port", port, "--data-dir", data],
        cwd=REPOSITORY,
        env={**os.environ, "ONNX_QAT_LOG_LEVEL": "warning"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the service ended at its start"
            assert time.monotonic() < deadline, "the service did not become ready"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/ready").is_success:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx and a little of the digits."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copy(model_path("mnist-conv"), folder / "model.onnx")
    digits = load_digits()
    for name, samples in (
        ("train", digits.train),
        ("test", digits.test),
        ("calibration", digits.calibration),
    ):
        np.savez(folder / f"{name}.npz", Input3=samples.images[:64], labels=samples.labels[:64])
    return folder


def run(
    arguments: list[object], server: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "ONNX_QAT_SERVER": server, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_prepares_a_model(server: str, inputs: Path, tmp_path: Path) -> None:
    script = [EXAMPLES / "prepare.sh", inputs / "model.onnx", inputs / "calibration.npz"]
    done = run([*script, tmp_path / "bundle.zip"], server, tmp_path, ONNX_QAT_RECIPE='{"weight_bits": 4}')
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "bundle.zip") as bundle:
        assert json.loads(bundle.read("manifest.json"))["recipe"]["weight_bits"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]

    refused = run([*script, tmp_path / "no.zip"], server, tmp_path, ONNX_QAT_RECIPE='{"weight_bits": 1}')
    assert refused.returncode != 0
    assert '"code":"recipe_invalid"' in refused.stderr
    failed = run([script[0], script[2], script[2], tmp_path / "no.zip"], server, tmp_path)
    assert (failed.returncode, "model_not_onnx" in failed.stderr) == (1, True)
    assert not (tmp_path / "no.zip").exists()


def test_the_python_client_makes_an_int8_model(server: str, inputs: Path, tmp_path: Path) -> None:
    arguments = [EXAMPLES / "quantize.py", inputs / "model.onnx", inputs, tmp_path, "--bits", 4]
    done = run([sys.executable, *arguments], server, tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert path == tmp_path / "int8" / "model.int8.onnx"
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.INT8 in types


def test_mlflow_gets_bundle_report_and_losses(server: str, inputs: Path, tmp_path: Path) -> None:
    arguments = [EXAMPLES / "mlflow_run.py", inputs / "model.onnx", inputs, "--bits", 4]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    done = run([sys.executable, *arguments], server, tmp_path, MLFLOW_TRACKING_URI=store)
    assert done.returncode == 0, done.stderr
    tracking = mlflow.MlflowClient(store)
    logged = tracking.get_run(done.stdout.splitlines()[-1])
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {"weight_bits": "4", "activation_bits": "4"}
    assert set(logged.data.metrics) == {"train_loss", "test_loss", "test_top1"}
    (tmp_path / "got").mkdir()
    folder = Path(tracking.download_artifacts(logged.info.run_id, "", str(tmp_path / "got")))
    assert (folder / "bundle/manifest.json").is_file()
    assert (folder / "checkpoint/trained_checkpoint").is_file()
    report = json.loads((folder / "int8/finalize.json").read_text())
    assert report["agreement"]["samples"] == 64
    assert (folder / "int8/model.int8.onnx").is_file()


def test_the_workflow_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    checked = subprocess.run([*command, str(WORKFLOW)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_steps_of_the_workflow_prepare_a_model(server: str, inputs: Path, tmp_path: Path) -> None:
    """What it runs, but for the installation, with what GitHub sets."""
    steps = {
        step.get("name"): step for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["prepare"]["steps"]
    }
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "onnx-qat"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -c "{COMMAND}" "$@"\n')
    command.chmod(0o755)
    (tmp_path / "models").mkdir()
    shutil.copy(inputs / "model.onnx", tmp_path / "models/float.onnx")
    shutil.copy(inputs / "calibration.npz", tmp_path / "models/calibration.npz")
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "ONNX_QAT_SERVER": server,
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }

    def bash(script: str) -> None:
        subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=True)

    bash(steps["Prepare the model"]["run"])
    environment["JOB"] = (tmp_path / "output").read_text().strip().removeprefix("job=")
    bash(steps["Download the bundle"]["run"])
    assert json.loads((tmp_path / "bundle/manifest.json").read_text())["recipe"]["weight_bits"] == 4
