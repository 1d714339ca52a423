"""Sessions that print nothing, and errors that a person can read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from rewriter import inference
from rewriter.errors import ErrorCode, QatError


def model(text: str) -> bytes:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]>\n{text}')
    serialized: bytes = proto.SerializeToString()
    return serialized


RESHAPE = model("g (float[N, 4] x, int64[1] shape) => (y) { [reshape] y = Reshape(x, shape) }")


def test_outputs_come_in_the_order_asked_for() -> None:
    session = inference.open_session(model("g (float[N] x) => (a, b) { a = Neg(x) b = Abs(x) }"))
    x = np.array([-2, 3], np.float32)
    b, a = inference.run(session, ["b", "a"], {"x": x})
    np.testing.assert_array_equal(a, -x)
    np.testing.assert_array_equal(b, abs(x))


def test_a_failing_node_is_named() -> None:
    session = inference.open_session(RESHAPE)
    feed = {"x": np.zeros((2, 4), np.float32), "shape": np.array([3])}
    with pytest.raises(QatError, match="on samples 0 to 1") as caught:
        inference.run(session, ["y"], feed, "samples 0 to 1")
    assert (caught.value.code, caught.value.node) == (ErrorCode.RUN_FAILED, "reshape")
    assert "/onnxruntime" not in caught.value.message


def test_a_model_that_is_refused_is_said_without_its_temporary_folder(tmp_path: Path) -> None:
    folder = tmp_path / ".onnx-qat-012345" / "a b"
    folder.mkdir(parents=True)
    bad = model("g (float[N] x) => (y) { [node] y = Abs(x) }").replace(b"Abs", b"Abz")
    (folder / "model.onnx").write_bytes(bad)
    with pytest.raises(QatError) as caught:
        inference.open_session(folder / "model.onnx")
    assert caught.value.code == ErrorCode.RUN_FAILED
    assert "model.onnx" in caught.value.message
    assert "Abz" in caught.value.message
    assert ".onnx-qat" not in caught.value.message


def test_a_long_message_is_cut() -> None:
    assert len(inference.reason(RuntimeError("word " * 1000))) == 400


def test_an_exception_without_a_message_is_said_by_its_class() -> None:
    assert inference.reason(MemoryError()) == "MemoryError"


def test_nothing_is_printed_of_an_initializer_that_is_not_used(capfd: pytest.CaptureFixture[str]) -> None:
    inference.open_session(model("g (float[N] x) => (y) <float[1] unused = {1.0}> { y = Abs(x) }"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "/onnxruntime_src/orttraining/api/module.cc:312 onnxruntime::api::Module::Module(const Ids&, "
            "std::vector<std::shared_ptr<P> >&) [ONNXRuntimeError] : 1 : FAIL : Node (n) Op (Sub) bad",
            "Node (n) Op (Sub) bad",
        ),
        (
            "Exception: /onnxruntime_src/a_b.cc:945 onnxruntime::f(pybind11::module&)::<lambda(const "
            "std::string&)> [ONNXRuntimeError] : 1 : FAIL : checkpoint.cc:867 Load Verification failed",
            "Load Verification failed",
        ),
        ("running Reshape node. /onnxruntime_src/x/y.h:45 A::A(const T&, bool) it is false", None),
    ],
)
def test_the_innermost_reason_is_said_without_source_lines(said: str, kept: str | None) -> None:
    assert inference.reason(RuntimeError(said)) == (kept or "running Reshape node. it is false")


def test_the_only_node_of_an_operator_that_is_refused_is_named(tmp_path: Path) -> None:
    cubic = """g (float[N, 4, 4, 1] x) => (y) {
        scales = Constant<value_floats = [1.0, 2.0, 2.0, 1.0]>()
        [enlarge] y = Resize<mode = "cubic">(x, , scales)
    }"""
    (tmp_path / "model.onnx").write_bytes(model(cubic))
    with pytest.raises(QatError) as caught:
        inference.open_session(tmp_path / "model.onnx")
    assert caught.value.node == "enlarge"
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in caught.value.message


def test_a_process_bound_to_one_core_gets_no_further_thread() -> None:
    code = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from rewriter import inference
before = set(os.listdir("/proc/self/task"))
session = inference.open_session(bytes.fromhex(sys.argv[1]))
print(len(set(os.listdir("/proc/self/task")) - before))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, RESHAPE.hex()], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "0\n"
