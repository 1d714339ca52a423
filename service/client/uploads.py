"""Files on their way to the service: found, named by their content, streamed from disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from rewriter import ErrorCode, Progress, QatError
from service.uploads.kinds import FILE_NAMES, UploadKind
from service.uploads.schemas import StoredFile

if TYPE_CHECKING:
    import google.protobuf.message  # type: ignore[import-untyped]
    import onnx

_PROTOBUF_BYTES: Final = 2**31
_FORM_FIELDS: Final = {
    UploadKind.MODEL: "model",
    UploadKind.DATASET: "dataset",
    UploadKind.CHECKPOINT: "checkpoint",
}
_NOT_FOUND: Final = {
    UploadKind.MODEL: ErrorCode.MODEL_NOT_FOUND,
    UploadKind.DATASET: ErrorCode.DATA_NOT_FOUND,
    UploadKind.CHECKPOINT: ErrorCode.CHECKPOINT_INVALID,
}


@dataclass(frozen=True)
class LocalFile:
    """A file to upload, and the name that the service keeps it under."""

    path: Path
    name: str


def collect(kind: UploadKind, path: Path, external_data: Sequence[Path] | None) -> list[LocalFile]:
    """The file and what belongs to it; without a list of external data, what the model refers to.

    Raises:
        QatError: `model_not_found`, `data_not_found`, `checkpoint_invalid`, `external_data_missing`,
            `external_data_outside`.
    """
    if not path.is_file():
        raise QatError(_NOT_FOUND[kind], f"There is no file {path}.", file=path.name)
    if external_data is None:
        external_data = _referred_files(path) if kind is UploadKind.MODEL else ()
    files = [LocalFile(path, FILE_NAMES[kind])]
    for data in external_data:
        if not data.is_file():
            raise QatError(
                ErrorCode.EXTERNAL_DATA_MISSING, f"The model's data file {data} is missing.", file=data.name
            )
        files.append(LocalFile(data, data.name))
    return files


def _referred_files(model: Path) -> list[Path]:
    """The files that tensors of a model lie in. What is not a model has none: the service says what it is."""
    from google.protobuf.message import DecodeError

    try:
        locations = set(_locations(_parsed(model)))
    except (DecodeError, RecursionError):
        return []
    names = sorted({str(PurePosixPath(location)) for location in locations})
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name:
            raise QatError(
                ErrorCode.EXTERNAL_DATA_OUTSIDE,
                "The service takes external data that lies beside the model, in no other folder: save the "
                "model again with a plain file name for it.",
                file=name,
            )
    return [model.parent / name for name in names]


def _parsed(model: Path) -> onnx.ModelProto:
    import onnx

    # Protobuf reads no larger file.
    content = model.read_bytes() if model.stat().st_size < _PROTOBUF_BYTES else b""
    proto = onnx.ModelProto()
    proto.ParseFromString(content)
    return proto


def _locations(message: google.protobuf.message.Message) -> Iterator[str]:
    """Where the tensors say that their data is, in subgraphs and functions too."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _locations(inner)


def digest(file: LocalFile) -> StoredFile:
    """What the service will call the file."""
    with file.path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return StoredFile(name=file.name, bytes=stream.tell(), sha256=sha256)


@contextlib.contextmanager
def opened(kind: UploadKind, files: Sequence[LocalFile], progress: Progress) -> Iterator[dict[str, Any]]:
    """httpx's arguments for a request with the files: a single one as the body itself, several as a form."""
    counter = _Counter(files, progress)
    with contextlib.ExitStack() as stack:
        main, *others = (stack.enter_context(_CountedFile(file.path, counter)) for file in files)
        if not others:
            yield {"content": main, "headers": {"Content-Type": "application/octet-stream"}}
            return
        parts = [(_FORM_FIELDS[kind], (files[0].name, main))]
        parts += [("external_data", (file.name, data)) for file, data in zip(files[1:], others, strict=True)]
        yield {"files": parts}


class _Counter:
    """Adds up what has been read of some files."""

    def __init__(self, files: Sequence[LocalFile], progress: Progress) -> None:
        self._stage = f"upload {files[0].path.name}"
        self._total = sum(file.path.stat().st_size for file in files)
        self._progress = progress
        self._read = 0
        progress(self._stage, 0.0)

    def add(self, count: int) -> None:
        self._read += count
        self._progress(self._stage, min(self._read / max(self._total, 1), 1.0))


class _CountedFile(io.FileIO):
    """A file that says how much of it is read."""

    def __init__(self, path: Path, counter: _Counter) -> None:
        super().__init__(path)
        self._counter = counter

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._counter.add(len(data))
        return data
