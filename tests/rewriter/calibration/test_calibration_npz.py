"""rewriter/calibration/npz.py: what an npz must hold, and that it is read batch by batch."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.calibration.npz import NpzSamples
from rewriter.errors import ErrorCode, QatError


def graph_input(name: str = "x", dtype: ir.DataType = ir.DataType.FLOAT, shape: Any = ("N", 3)) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))


def refusal(path: Path, *inputs: ir.Value) -> QatError:
    with pytest.raises(QatError) as caught:
        for _ in NpzSamples.open(path, inputs or [graph_input()]).batches(2):
            pass
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "samples.npz"


class TestReading:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
    @pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
    def test_batches_are_the_samples_in_order_and_the_last_is_shorter(
        self, path: Path, save: Any, batch_size: int
    ) -> None:
        x = np.arange(15, dtype=np.float32).reshape(5, 3)
        ids = np.arange(20, dtype=np.int64).reshape(5, 4)
        save(path, **{"x": x, "a/b.ids": ids, "labels": np.arange(7)})
        samples = NpzSamples.open(
            path, [graph_input(), graph_input("a/b.ids", ir.DataType.INT64, ["N", "length"])]
        )
        assert len(samples) == 5
        for _ in range(2):
            batches = list(samples.batches(batch_size))
            sizes = [len(batch["x"]) for batch in batches]
            assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
            np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), x)
            np.testing.assert_array_equal(np.concatenate([b["a/b.ids"] for b in batches]), ids)
            assert all(set(batch) == {"x", "a/b.ids"} for batch in batches)

    def test_a_fixed_batch_is_filled_with_the_last_sample(self, path: Path) -> None:
        np.savez(path, x=np.arange(5, dtype=np.float32)[:, None].repeat(3, 1))
        samples = NpzSamples.open(path, [graph_input(shape=[2, 3])])
        assert [batch["x"][:, 0].tolist() for batch in samples.batches(32)] == [[0, 1], [2, 3], [4, 4]]

    @pytest.mark.parametrize("shape", [None, [-1, 3], [0, 3], ["N", "C"]])
    def test_dynamic_dimensions_take_any_size(self, path: Path, shape: Any) -> None:
        np.savez(path, x=np.zeros((4, 3), np.float32))
        assert len(NpzSamples.open(path, [graph_input(shape=shape)])) == 4

    @pytest.mark.parametrize("stored", ["<f8", ">f4", "<f2", "<i8", "u1", "?"])
    def test_numbers_are_converted_for_a_float_input(self, path: Path, stored: str) -> None:
        x = np.array([[0, 1, 1], [1, 0, 0]], stored)
        np.savez(path, x=x)
        (batch,) = NpzSamples.open(path, [graph_input()]).batches(4)
        assert batch["x"].dtype == np.float32
        np.testing.assert_array_equal(batch["x"], x.astype(np.float32))

    def test_integers_are_converted_for_an_integer_input(self, path: Path) -> None:
        np.savez(path, x=np.array([[1, 2, 255]], np.uint8))
        (batch,) = NpzSamples.open(path, [graph_input(dtype=ir.DataType.INT64)]).batches(4)
        assert batch["x"].dtype == np.int64
        assert batch["x"].tolist() == [[1, 2, 255]]

    def test_big_endian_integers_are_read_as_numbers(self, path: Path) -> None:
        np.savez(path, x=np.array([[1, 2, 3]], ">i4"))
        (batch,) = NpzSamples.open(path, [graph_input(dtype=ir.DataType.INT64)]).batches(4)
        assert batch["x"].tolist() == [[1, 2, 3]]

    @given(count=st.integers(1, 20), width=st.integers(1, 5), batch_size=st.integers(1, 25))
    def test_nothing_is_lost_or_repeated(self, count: int, width: int, batch_size: int) -> None:
        x = np.arange(count * width, dtype=np.float32).reshape(count, width)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=x)
        buffer.seek(0)
        samples = NpzSamples.open(_in_memory(buffer), [graph_input(shape=["N", width])])
        np.testing.assert_array_equal(np.concatenate([b["x"] for b in samples.batches(batch_size)]), x)


def _in_memory(buffer: io.BytesIO) -> Any:
    buffer.name = "samples.npz"
    return buffer


class TestRefusals:
    def test_no_file(self, path: Path) -> None:
        assert refusal(path).code == ErrorCode.DATA_NOT_FOUND

    @pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 100])
    def test_not_a_zip(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        assert refusal(path).code == ErrorCode.DATA_NOT_NPZ

    def test_a_single_array_file(self, path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.zeros((2, 3), np.float32))
        assert refusal(path).code == ErrorCode.DATA_NOT_NPZ

    def test_a_missing_input_is_named_with_what_there_is(self, path: Path) -> None:
        np.savez(path, images=np.zeros((2, 3), np.float32))
        error = refusal(path)
        assert (error.code, error.field, error.file) == (ErrorCode.DATA_INPUT_MISSING, "x", "samples.npz")
        assert "images" in error.message

    @pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 3, 1), ()])
    def test_wrong_rank_or_dimension(self, path: Path, shape: tuple[int, ...]) -> None:
        np.savez(path, x=np.zeros(shape, np.float32))
        error = refusal(path)
        assert (error.code, error.field) == (ErrorCode.DATA_SHAPE_MISMATCH, "x")

    def test_inputs_with_different_counts_of_samples(self, path: Path) -> None:
        np.savez(path, x=np.zeros((2, 3), np.float32), y=np.zeros((4, 3), np.float32))
        error = refusal(path, graph_input("x"), graph_input("y"))
        assert error.code == ErrorCode.DATA_SHAPE_MISMATCH
        assert "x: 2, y: 4" in error.message

    def test_inputs_that_prescribe_different_batches(self, path: Path) -> None:
        np.savez(path, x=np.zeros((4, 3), np.float32), y=np.zeros((4, 3), np.float32))
        error = refusal(path, graph_input("x", shape=[1, 3]), graph_input("y", shape=[2, 3]))
        assert error.code == ErrorCode.DATA_SHAPE_MISMATCH

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
    def test_no_samples(self, path: Path, shape: tuple[int, ...]) -> None:
        np.savez(path, x=np.zeros(shape, np.float32))
        assert refusal(path, graph_input(shape=["N", "C"])).code == ErrorCode.DATA_EMPTY

    @pytest.mark.parametrize(
        ("array", "wanted"),
        [
            (np.zeros((2, 3), np.complex64), ir.DataType.FLOAT),
            (np.full((2, 3), "a"), ir.DataType.FLOAT),
            (np.full((2, 3), None), ir.DataType.FLOAT),
            (np.zeros((2, 3), [("a", "f4")]), ir.DataType.FLOAT),
            (np.zeros((2, 3), np.float32), ir.DataType.INT64),
            (np.zeros((2, 3), np.int64), ir.DataType.BOOL),
            (np.full((2, 3), "a"), ir.DataType.STRING),
        ],
    )
    def test_a_type_that_does_not_convert(self, path: Path, array: Any, wanted: ir.DataType) -> None:
        np.savez(path, allow_pickle=True, x=array)
        error = refusal(path, graph_input(dtype=wanted))
        assert (error.code, error.field) == (ErrorCode.DATA_TYPE_MISMATCH, "x")

    def test_an_integer_that_does_not_fit(self, path: Path) -> None:
        np.savez(path, x=np.array([[1, 2, 2**40]], np.int64))
        assert refusal(path, graph_input(dtype=ir.DataType.INT32)).code == ErrorCode.DATA_TYPE_MISMATCH

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_name_the_sample(self, path: Path, bad: float) -> None:
        x = np.zeros((5, 3), np.float32)
        x[3, 1] = bad
        np.savez(path, x=x)
        error = refusal(path)
        assert (error.code, error.field) == (ErrorCode.DATA_NOT_FINITE, "x")
        assert "Sample 3 " in error.message

    def test_a_double_that_overflows_float32_is_not_finite(self, path: Path) -> None:
        np.savez(path, x=np.full((1, 3), 1e300))
        assert refusal(path).code == ErrorCode.DATA_NOT_FINITE

    def test_fortran_order(self, path: Path) -> None:
        np.savez(path, x=np.asfortranarray(np.zeros((2, 3), np.float32)))
        error = refusal(path)
        assert error.code == ErrorCode.DATA_NOT_NPZ
        assert "ascontiguousarray" in error.message

    def test_a_header_that_claims_more_than_there_is(self, path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", header.getvalue() + b"\0" * 12)
        assert refusal(path).code == ErrorCode.DATA_NOT_NPZ

    def test_a_sample_too_large_to_hold(self, path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1, 2**40)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", header.getvalue())
        assert refusal(path, graph_input(shape=["N", "C"])).code == ErrorCode.DATA_SHAPE_MISMATCH

    @pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compression(self, path: Path, compression: int) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("x.npy", b"")
        assert refusal(path).code == ErrorCode.DATA_NOT_NPZ

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
    def test_damaged_values(self, path: Path, save: Any) -> None:
        save(path, x=np.random.default_rng(0).random((64, 3), np.float32))
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            middle = archive.getinfo("x.npy").header_offset + 400
        content[middle] ^= 0x10
        path.write_bytes(content)
        assert refusal(path).code == ErrorCode.DATA_NOT_NPZ

    @given(content=st.binary(max_size=200))
    def test_any_member_content_is_an_answer_with_a_code(self, content: bytes) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + content)
        buffer.seek(0)
        assert refusal(_in_memory(buffer)).code.value.startswith("data_")


_PEAK = """
import pathlib, sys
import onnx_ir as ir
from rewriter.calibration.npz import NpzSamples
x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3, 224, 224]))
samples = NpzSamples.open(pathlib.Path(sys.argv[1]), [x])
assert sum(len(batch["x"]) for batch in samples.batches(8)) == len(samples)
# The peak of this program alone: ru_maxrss would include that of the process that started it.
status = pathlib.Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    peaks = {}
    for count in (64, 512):
        path = tmp_path / f"{count}.npz"
        np.savez_compressed(path, x=np.zeros((count, 3, 224, 224), np.float32))  # 301 MB unpacked for 512
        command = [sys.executable, "-c", _PEAK, str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = int(run.stdout) * 1024
    assert peaks[512] - peaks[64] < 20e6
