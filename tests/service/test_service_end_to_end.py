"""The real library behind the real command: a float model goes in over HTTP, an int8 model comes out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from deployments import DEPLOYMENTS
from service_helpers import Script, wait_for

from examples.models import model_path
from rewriter import finetune


@contextlib.contextmanager
def command(*arguments: str, data: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`onnx-qat ...` in a process of its own."""
    # Beside this interpreter: the tests may run without an activated environment.
    path = Path(sys.executable).with_name("onnx-qat")
    process = subprocess.Popen(
        [path, *arguments, "--data-dir", data],
        env={**os.environ, "ONNX_QAT_LOG_LEVEL": "warning", **environment},
    )
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15)


@pytest.fixture(scope="module", params=list(DEPLOYMENTS))
def deployed(request: pytest.FixtureRequest) -> str:
    """In which of the ways."""
    way: str = request.param
    return way


@pytest.fixture(scope="module")
def directory(deployed: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of a deployment have their data directories."""
    return tmp_path_factory.mktemp(f"service_{deployed}")


@pytest.fixture(scope="module")
def client(deployed: str, directory: Path) -> Iterator[httpx.Client]:
    """A client of `onnx-qat serve`, deployed in one of the ways."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with DEPLOYMENTS[deployed]() as deployment, contextlib.ExitStack() as stack:
        environment = deployment.environment
        process = stack.enter_context(
            command("serve", "--port", port, data=directory / "data", environment=environment)
        )
        if deployment.has_workers:
            stack.enter_context(command("worker", data=directory / "worker", environment=environment))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health/ready").is_success:
                        break
                time.sleep(0.1)
            yield client


# The library's own failures are the same wherever its process was started from.
only_embedded = pytest.mark.parametrize("deployed", ["embedded"], indirect=True)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def samples(count: int) -> tuple[str, np.ndarray]:
    model = onnx.load(model_path("mnist-conv"))
    values = np.random.default_rng(0).random((count, 1, 28, 28), dtype=np.float32)
    return model.graph.input[0].name, values


def prepare(client: httpx.Client, model: bytes, **parts: bytes) -> Script:
    answer = client.post("/v1/prepare", files={"model": model, **parts})
    assert answer.status_code == 202, answer.text
    return wait_for(client, answer.json()["id"], seconds=120)


def test_a_model_is_prepared_trained_and_finalized(client: httpx.Client, tmp_path: Path) -> None:
    name, values = samples(16)
    job = prepare(client, model_path("mnist-conv").read_bytes(), calibration=npz(**{name: values}))
    assert job["state"] == "succeeded", job["failure"]

    bundle = tmp_path / "bundle"
    archive = client.get(f"/v1/jobs/{job['id']}/bundle").content
    zipfile.ZipFile(io.BytesIO(archive)).extractall(bundle)
    assert sorted(path.name for path in bundle.iterdir()) == [file["name"] for file in job["files"]]
    manifest = client.get(f"/v1/jobs/{job['id']}/files/manifest.json").json()
    assert manifest["quantizers"]

    (tmp_path / "train.npz").write_bytes(npz(**{name: values, "labels": np.arange(16) % 10}))
    trained = tmp_path / "trained"
    finetune(bundle, tmp_path / "train.npz", batch_size=8, checkpoint_out=trained)

    checkpoint = client.post("/v1/checkpoints", content=trained.read_bytes())
    verify = client.post("/v1/datasets", content=npz(**{name: values}))
    request = {
        "kind": "finalize",
        "prepare_job": job["id"],
        "checkpoint": checkpoint.json()["id"],
        "verify": verify.json()["id"],
    }
    done = wait_for(client, client.post("/v1/jobs", json=request).json()["id"], seconds=120)
    assert done["state"] == "succeeded", done["failure"]
    int8 = client.get(f"/v1/jobs/{done['id']}/files/model.int8.onnx").content
    types = {tensor.data_type for tensor in onnx.load_from_string(int8).graph.initializer}
    assert onnx.TensorProto.INT8 in types
    (output,) = onnxruntime.InferenceSession(int8, providers=["CPUExecutionProvider"]).run(
        None, {name: values}
    )
    assert output.shape == (16, 10)
    report = client.get(f"/v1/jobs/{done['id']}/files/finalize.json").json()
    assert report["agreement"] is not None


def external_data_outside() -> bytes:
    model = onnx.load(model_path("mnist-conv"))
    tensor = onnx.numpy_helper.from_array(np.zeros(100, np.float32), "weight")
    model.graph.initializer.append(tensor)
    tensor = model.graph.initializer[-1]
    onnx.external_data_helper.set_external_data(tensor, location="../../../../../../etc/passwd")
    tensor.ClearField("raw_data")
    return model.SerializeToString()


def unknown_domain() -> bytes:
    model = onnx.load(model_path("mnist-conv"))
    model.graph.node[0].domain = "org.example"
    model.opset_import.append(onnx.helper.make_opsetid("org.example", 1))
    return model.SerializeToString()


def no_float_weights() -> bytes:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 4])],
    )
    model: bytes = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model


@only_embedded
@pytest.mark.parametrize(
    ("model", "code"),
    [
        (lambda: b"this is not a model", "model_not_onnx"),
        (lambda: model_path("mnist-conv").read_bytes()[:5000], "model_not_onnx"),
        (external_data_outside, "external_data_outside"),
        (unknown_domain, "model_domain_unknown"),
        (no_float_weights, "model_no_float_weights"),
    ],
    ids=["not a protobuf", "truncated", "external data outside", "unknown domain", "no float weights"],
)
def test_a_model_that_cannot_be_processed_fails_with_its_code(client: httpx.Client, model, code: str) -> None:
    job = prepare(client, model())
    assert (job["state"], job["failure"]["code"]) == ("failed", code), job["failure"]
    assert job["failure"]["detail"]
    assert job["files"] == []


@only_embedded
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lambda name, values: b"not an npz", "data_not_npz"),
        (lambda name, values: npz(other=values), "data_input_missing"),
        (lambda name, values: npz(**{name: values[..., :20]}), "data_shape_mismatch"),
    ],
    ids=["not an npz", "input missing", "wrong shape"],
)
def test_calibration_data_that_does_not_fit_fails_with_its_code(
    client: httpx.Client, data, code: str
) -> None:
    job = prepare(client, model_path("mnist-conv").read_bytes(), calibration=data(*samples(4)))
    assert (job["state"], job["failure"]["code"]) == ("failed", code), job["failure"]


@only_embedded
def test_the_same_inputs_give_the_same_bundle(client: httpx.Client) -> None:
    """The same model under another id (a file beside it that it does not use) is another job."""
    name, values = samples(4)
    model = model_path("mnist-conv").read_bytes()
    jobs = [
        prepare(client, model, calibration=npz(**{name: values})),
        prepare(client, model, calibration=npz(**{name: values}), external_data=b"unused"),
    ]
    assert jobs[0]["id"] != jobs[1]["id"]
    assert jobs[0]["bundle"]["sha256"] == jobs[1]["bundle"]["sha256"]
    assert json.dumps(jobs[0]["files"]) == json.dumps(jobs[1]["files"])


def test_nothing_half_written_is_left(client: httpx.Client, directory: Path) -> None:
    left = [
        os.path.join(root, name)
        for root, folders, files in os.walk(directory)
        if os.path.basename(root) in ("scratch", "staging", "inputs")
        for name in folders + files
    ]
    assert left == []
