"""Real processes of the real library get small files that want much, and a model that kills onnxruntime."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper
from service_helpers import Script, wait_for

from examples.models import model_path
from service.app import create_app
from service.settings import Settings

MEMORY: Final = 2 << 30


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The service with small limits; its jobs' processes are the real ones."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("bombs") / "data",
        log_level="error",
        workers=2,
        job_memory_bytes=MEMORY,
        job_cpu_seconds=60,
    )
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        yield client


def prepare(client: TestClient, model: bytes, **parts: bytes) -> str:
    answer = client.post("/v1/prepare", files={"model": model, **parts})
    assert answer.status_code == 202, answer.text
    identifier: str = answer.json()["id"]
    return identifier


def ended(client: TestClient, job: str) -> Script:
    return wait_for(client, job, seconds=180)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def mnist() -> bytes:
    return model_path("mnist-conv").read_bytes()


def mnist_input() -> str:
    return str(onnx.load(model_path("mnist-conv")).graph.input[0].name)


# Protobuf, https://protobuf.dev/programming-guides/encoding/


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


IR_VERSION: Final = varint(1 << 3) + varint(8)


def nested_messages() -> bytes:
    """A node with an attribute with a graph with a node, and so on."""
    graph = b""
    for _ in range(5000):
        graph = field(1, field(5, field(6, graph)))
    return IR_VERSION + field(7, graph)


def huge_length() -> bytes:
    return IR_VERSION + varint(7 << 3 | 2) + varint((1 << 63) - 1) + b"x"


def empty_nodes() -> bytes:
    """Two bytes each in the file, and a hundred in memory."""
    return IR_VERSION + field(7, field(1, b"") * 10_000_000)


def external_data_beyond_the_file() -> bytes:
    model = onnx.load(model_path("mnist-conv"))
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor = model.graph.initializer[-1]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "external_data", "offset": str((1 << 64) - 8)}.items():
        tensor.external_data.add(key=key, value=value)
    return bytes(model.SerializeToString())


def constant_of_terabytes() -> bytes:
    value = helper.make_tensor_value_info
    weights = {"w": np.ones((4, 4), np.float32), "s": np.array([1 << 40], np.int64)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("ConstantOfShape", ["s"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
            helper.make_node("Add", ["h", "r"], ["y"]),
        ],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = helper.make_opsetid("", 18)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (nested_messages, "model_not_onnx"),
        (huge_length, "model_not_onnx"),
        (empty_nodes, "worker_out_of_memory"),
        (external_data_beyond_the_file, "external_data_missing"),
        (constant_of_terabytes, "model_too_large"),
    ],
)
def test_a_model_that_wants_much_fails_with_its_code(
    client: TestClient, model: Callable[[], bytes], code: str
) -> None:
    job = ended(client, prepare(client, model(), external_data=b"x" * 16))
    assert (job["state"], job["failure"]["code"]) == ("failed", code), job["failure"]


def test_fields_that_nobody_knows_do_no_harm(client: TestClient) -> None:
    job = ended(client, prepare(client, mnist() + field(1000, b"x") * 2_000_000))
    assert job["state"] == "succeeded", job["failure"]


SAMPLE: Final = (1, 28, 28)
SAMPLE_BYTES: Final = 4 * 28 * 28
MOST: Final = (1 << 32) // SAMPLE_BYTES - 1  # samples in the largest member that is no Zip64


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def archive(content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written:
        written.writestr(f"{mnist_input()}.npy", content)
    return bytearray(file.getvalue())


def header_that_claims_much() -> bytearray:
    """100 GB, of which there are 3 KB."""
    return archive(header((34_000_000, *SAMPLE)) + bytes(SAMPLE_BYTES))


def claiming(data: bytearray, size: int) -> bytearray:
    """The archive with that size of its member in the zip's directory (APPNOTE.TXT, 4.3.12)."""
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", size)
    return data


def directory_that_claims_much() -> bytearray:
    """The zip's directory and the array's header agree on 4 GB, and the stream ends early."""
    start = header((MOST, *SAMPLE))
    return claiming(archive(start + bytes(SAMPLE_BYTES)), len(start) + MOST * SAMPLE_BYTES)


def array_in_a_zip_in_a_zip() -> bytearray:
    return archive(bytes(archive(header((1, *SAMPLE)) + bytes(SAMPLE_BYTES))))


def huge_header() -> bytearray:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 5_000_000 + b")}\n"
    return archive(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)


@pytest.mark.parametrize(
    ("calibration", "code"),
    [
        (header_that_claims_much, "data_not_npz"),
        (directory_that_claims_much, "data_not_npz"),
        (array_in_a_zip_in_a_zip, "data_not_npz"),
        (huge_header, "data_not_npz"),
    ],
)
def test_samples_that_claim_much_fail_with_their_code(
    client: TestClient, calibration: Callable[[], bytearray], code: str
) -> None:
    job = ended(client, prepare(client, mnist(), calibration=bytes(calibration())))
    assert (job["state"], job["failure"]["code"]) == ("failed", code), job["failure"]


def expanding_samples() -> bytearray:
    """4 GB of zeros in 4 MB: the same compressed block again and again."""
    start, block = header((MOST, *SAMPLE)), 1 << 24
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = compressor.compress(start) + compressor.flush(zlib.Z_FULL_FLUSH)
    zeros = compressor.compress(bytes(block)) + compressor.flush(zlib.Z_FULL_FLUSH)
    count, rest = divmod(MOST * SAMPLE_BYTES, block)
    tail = compressor.compress(bytes(rest)) + compressor.flush()
    data = archive(head + zeros * count + tail, zipfile.ZIP_STORED)
    for place in (data.index(b"PK\x03\x04") + 8, data.rindex(b"PK\x01\x02") + 10):
        data[place : place + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
    return claiming(data, len(start) + MOST * SAMPLE_BYTES)


def test_samples_that_expand_much_take_time_and_no_memory(tmp_path: Path) -> None:
    """Twice the memory that the process may have: it goes on until its CPU time is over."""
    settings = Settings(
        data_dir=tmp_path / "data", log_level="error", job_memory_bytes=MEMORY, job_cpu_seconds=10
    )
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        job = ended(client, prepare(client, mnist(), calibration=bytes(expanding_samples())))
    assert job["failure"]["code"] == "worker_timeout", job["failure"]
    assert "calibrat" in job["failure"]["detail"]


def test_a_model_that_kills_onnxruntime_fails_its_job_alone(client: TestClient) -> None:
    """ppocr4-rec wants samples 48 pixels high; with 32 onnxruntime 1.19 divides an integer by zero."""
    model = model_path("ppocr4-rec").read_bytes()
    samples = np.random.default_rng(0).random((1, 3, 32, 160), dtype=np.float32)
    job = ended(client, prepare(client, model, calibration=npz(x=samples)))
    assert (job["state"], job["failure"]["code"]) == ("failed", "worker_crashed")
    detail = job["failure"]["detail"]
    assert "SIGFPE" in detail
    assert "calibrat" in detail
    assert "height and width" in detail
    assert job["files"] == []

    assert client.get("/health/ready").status_code == 200
    after = ended(client, prepare(client, mnist()))
    assert after["state"] == "succeeded", after["failure"]
