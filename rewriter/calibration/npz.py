"""Samples in an npz file, read batch by batch: memory does not grow with the number of samples.

One array per graph input, under the input's name; the first axis counts the samples. Other arrays (labels,
metadata) are ignored. Members may be stored (`numpy.savez`) or deflated (`numpy.savez_compressed`). The file
is hostile input: nothing is unpickled, and no more than one batch is held whatever a header claims.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError

# One array per input name; the first axis counts the samples of the batch.
Batch = dict[str, npt.NDArray[Any]]

# A header may claim any shape; a sample of more than this is refused before memory is reserved for it.
MAX_SAMPLE_BYTES: Final = 2**30

_READ_ERRORS: Final = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


class Samples(Protocol):
    """What calibration runs the model on."""

    def __len__(self) -> int:
        """Number of samples, at least 1."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order; may be called again. See `NpzSamples.batches`."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """One array of the file and the graph input it feeds."""

    input: str
    member: str
    stored: np.dtype[Any]
    wanted: np.dtype[Any]
    shape: tuple[int, ...]


class NpzSamples:
    """The samples of an npz file for given graph inputs.

    Attributes:
        fixed_batch: the batch size that the graph inputs prescribe, or None.
    """

    def __init__(self, path: pathlib.Path, arrays: tuple[_Array, ...], fixed_batch: int | None) -> None:
        self._path = path
        self._arrays = arrays
        self.fixed_batch = fixed_batch

    @classmethod
    def open(cls, path: pathlib.Path, inputs: Iterable[ir.Value]) -> NpzSamples:
        """Check that the file feeds `inputs`; reads headers only.

        Dynamic dimensions of an input take any size, an input without a shape takes any array. Accepted
        types: the input's own; any integer, boolean or float for a float input (rounded to its precision);
        any integer or boolean for an integer input, if the values fit.

        Raises:
            QatError: `data_not_found`, `data_not_npz`, `data_input_missing`, `data_type_mismatch`,
                `data_shape_mismatch` (dimensions or number of samples), `data_empty`.
        """
        inputs = tuple(inputs)
        with _reading(path), zipfile.ZipFile(path) as archive:
            arrays = tuple(_find_array(archive, value, path) for value in inputs)
        counts = {array.input: array.shape[0] for array in arrays}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise QatError(
                ErrorCode.DATA_SHAPE_MISMATCH,
                f"The arrays differ in the number of samples along their first axis ({listed}).",
                file=path.name,
            )
        return cls(path, arrays, _fixed_batch(inputs, path))

    def __len__(self) -> int:
        return self._arrays[0].shape[0] if self._arrays else 0

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order, `batch_size` at a time, each array in its input's type; the last is shorter.

        Where the inputs prescribe a batch size, batches have exactly that size whatever `batch_size` is,
        and the last one is filled by repeating the last sample.

        Raises:
            QatError: `data_not_finite`, `data_type_mismatch` (an integer out of range), `data_not_npz`
                (a member is damaged).
        """
        size = self.fixed_batch or batch_size
        with contextlib.ExitStack() as stack:
            stack.enter_context(_reading(self._path))
            archive = stack.enter_context(zipfile.ZipFile(self._path))
            streams = [stack.enter_context(archive.open(array.member)) for array in self._arrays]
            for array, stream in zip(self._arrays, streams, strict=True):
                _read_header(stream, array.input, self._path)
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                batch = {
                    array.input: self._read(stream, array, start, count)
                    for array, stream in zip(self._arrays, streams, strict=True)
                }
                if self.fixed_batch is not None:
                    batch = {name: _fill(values, size) for name, values in batch.items()}
                yield batch
            for stream in streams:
                stream.read(1)  # reaching the end of a member compares its checksum

    def _read(self, stream: IO[bytes], array: _Array, start: int, count: int) -> npt.NDArray[Any]:
        values = np.empty((count, *array.shape[1:]), array.stored)
        view = values.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            data = stream.read(min(len(view) - done, 2**20))
            if not data:
                raise EOFError("the array is shorter than its header says")
            view[done : done + len(data)] = data
            done += len(data)
        converted = _convert(values, array, self._path)
        if converted.dtype.kind == "f" and not np.isfinite(converted).all():
            bad = np.flatnonzero(~np.isfinite(converted).reshape(count, -1).all(axis=1))[0]
            raise QatError(
                ErrorCode.DATA_NOT_FINITE,
                f"Sample {start + bad} of {array.input!r} holds NaN or infinity (as {converted.dtype}); "
                "remove or repair it.",
                field=array.input,
                file=self._path.name,
            )
        return converted


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Say what reading a file that is missing, not an npz or damaged comes to."""
    try:
        yield
    except FileNotFoundError as error:
        raise QatError(ErrorCode.DATA_NOT_FOUND, "The npz file does not exist.", file=path.name) from error
    except _READ_ERRORS as error:
        raise QatError(
            ErrorCode.DATA_NOT_NPZ,
            f"The file is not an npz as numpy.savez writes it, or is damaged: {error}.",
            file=path.name,
        ) from error


def _find_array(archive: zipfile.ZipFile, value: ir.Value, path: pathlib.Path) -> _Array:
    name = value.name or ""
    members = archive.NameToInfo
    member = members.get(f"{name}.npy") or members.get(name)
    if member is None:
        found = ", ".join(sorted(m.removesuffix(".npy") for m in members)[:20]) or "none"
        raise QatError(
            ErrorCode.DATA_INPUT_MISSING,
            f"The file has no array {name!r} for the model input of that name (arrays in it: {found}).",
            field=name,
            file=path.name,
        )
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{member.filename} is compressed by a method that numpy does not write")
    with archive.open(member) as stream:
        shape, stored = _read_header(stream, name, path)
        size = stream.tell() + math.prod(shape) * stored.itemsize
    wanted = _input_dtype(value)
    _check_type(name, stored, wanted, path)
    _check_shape(name, shape, value.shape, stored.itemsize, path)
    if size != member.file_size:
        raise zipfile.BadZipFile(f"{member.filename} does not have the length that its header says")
    return _Array(name, member.filename, stored, wanted, shape)


def _read_header(stream: IO[bytes], name: str, path: pathlib.Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type; the stream then stands at the first value."""
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = readers[version](stream)
    except (ValueError, KeyError, TypeError) as error:
        raise QatError(
            ErrorCode.DATA_NOT_NPZ, f"The array {name!r} has no valid npy header.", field=name, file=path.name
        ) from error
    if fortran_order:
        raise QatError(
            ErrorCode.DATA_NOT_NPZ,
            f"The array {name!r} is stored column by column (Fortran order); "
            "save numpy.ascontiguousarray of it.",
            field=name,
            file=path.name,
        )
    return shape, dtype


def _input_dtype(value: ir.Value) -> np.dtype[Any]:
    dtype = value.dtype
    return np.dtype(object) if dtype is None or dtype == ir.DataType.STRING else dtype.numpy()


def _check_type(name: str, stored: np.dtype[Any], wanted: np.dtype[Any], path: pathlib.Path) -> None:
    accepted = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}.get(wanted.kind, "")
    same = stored == wanted and not stored.hasobject
    if not same and stored.kind not in accepted:
        raise QatError(
            ErrorCode.DATA_TYPE_MISMATCH,
            f"The array {name!r} is {stored}, the model input takes "
            f"{'no type that an npz can hold' if wanted.hasobject else wanted}.",
            field=name,
            file=path.name,
        )


def _check_shape(
    name: str, shape: tuple[int, ...], wanted: ir.Shape | None, itemsize: int, path: pathlib.Path
) -> None:
    if len(shape) == 0 or (wanted is not None and len(wanted) == 0):
        raise QatError(
            ErrorCode.DATA_SHAPE_MISMATCH,
            f"{name!r} has no axis that counts samples.",
            field=name,
            file=path.name,
        )
    if min(shape) <= 0:
        raise QatError(
            ErrorCode.DATA_EMPTY,
            f"The array {name!r} is empty (shape {list(shape)}).",
            field=name,
            file=path.name,
        )
    if wanted is not None:
        sizes = [static_size(dim) for dim in wanted]
        fits = len(sizes) == len(shape) and all(
            size is None or size == found for size, found in zip(sizes[1:], shape[1:], strict=True)
        )
        if not fits:
            expected = ", ".join(["samples", *("any" if size is None else str(size) for size in sizes[1:])])
            raise QatError(
                ErrorCode.DATA_SHAPE_MISMATCH,
                f"The array {name!r} has shape {list(shape)}, the model input takes [{expected}].",
                field=name,
                file=path.name,
            )
    if math.prod(shape[1:]) * itemsize > MAX_SAMPLE_BYTES:
        raise QatError(
            ErrorCode.DATA_SHAPE_MISMATCH,
            f"One sample of {name!r} (shape {list(shape[1:])}) takes more than {MAX_SAMPLE_BYTES} bytes.",
            field=name,
            file=path.name,
        )


def static_size(dimension: int | ir.SymbolicDim) -> int | None:
    """The size of a dimension, None if it is dynamic (some exporters write -1 or 0 for that)."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def _fixed_batch(inputs: Iterable[ir.Value], path: pathlib.Path) -> int | None:
    fixed = {
        value.name: size
        for value in inputs
        if value.shape and (size := static_size(value.shape[0])) is not None
    }
    if len(set(fixed.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in fixed.items())
        raise QatError(
            ErrorCode.DATA_SHAPE_MISMATCH,
            f"The model inputs prescribe different batch sizes ({listed}), so that samples "
            "cannot be put into batches.",
            file=path.name,
        )
    return next(iter(fixed.values()), None)


def _convert(values: npt.NDArray[Any], array: _Array, path: pathlib.Path) -> npt.NDArray[Any]:
    if values.dtype == array.wanted:
        return values
    if array.wanted.kind in "iu" and values.dtype.kind in "iu":
        limits = np.iinfo(array.wanted)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise QatError(
                ErrorCode.DATA_TYPE_MISMATCH,
                f"The array {array.input!r} is {values.dtype} and holds values that do "
                f"not fit into {array.wanted}.",
                field=array.input,
                file=path.name,
            )
    with np.errstate(over="ignore"):  # what overflows is infinite, and reported as that
        return values.astype(array.wanted)


def _fill(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    missing = size - len(values)
    return values if missing == 0 else np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
