"""The service does what its OpenAPI document says, and only that: schemathesis with all its checks.

ONNX_QAT_TEST_EXAMPLES=200 makes a longer, random run of it: so many examples of each operation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from service_helpers import HERE, Server, submit, wait_for
from typer.testing import CliRunner

from service.cli import app

CONTRACT = HERE / "contract"
METRICS_TOKEN = "token of the metrics"


def test_the_service_conforms_to_its_document(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server(
        ONNX_QAT_LOG_LEVEL="error", ONNX_QAT_AUTH="keys", ONNX_QAT_METRICS_TOKEN=METRICS_TOKEN
    )
    data = str(tmp_path / "data")
    key = (
        CliRunner().invoke(app, ["keys", "create", "--tenant", "default", "--data-dir", data]).stdout.strip()
    )
    headers = {"Authorization": f"Bearer {key}"}
    with server.client(headers=headers) as client:
        wait_for(client, submit(client, {"files": {"a": "1"}}))
    examples = os.environ.get("ONNX_QAT_TEST_EXAMPLES")
    extent = (
        ["--max-examples", examples] if examples else ["--max-examples", "3", "--generation-deterministic"]
    )
    run = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            "--config-file",
            CONTRACT / "schemathesis.toml",
            "run",
            f"{server.url}/openapi.json",
            *extent,
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(CONTRACT),
            "ONNX_QAT_API_KEY": key,
            "ONNX_QAT_METRICS_TOKEN": METRICS_TOKEN,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    assert "✅ Stateful" in run.stdout
