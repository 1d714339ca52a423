"""Request bodies to files: streamed, hashed on the way, bounded, checked for safe names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio.to_thread
from fastapi import Request

from rewriter import ErrorCode
from service.errors import ServiceError, ServiceErrorCode
from service.settings import Settings
from service.uploads.models import UploadKind
from service.uploads.multipart import PartEnd, PartStart, boundary_of, read_parts
from service.uploads.schemas import StoredFile

# Written to disk in pieces of this many bytes.
_BLOCK: Final = 1 << 20
_RAW_MEDIA_TYPES: Final = frozenset(
    {
        "",
        "application/octet-stream",
        "binary/octet-stream",
        "application/onnx",
        "application/protobuf",
        "application/x-protobuf",
        "application/zip",
    }
)
_MULTIPART: Final = "multipart/form-data"


@dataclass(frozen=True)
class FileField:
    """A form field whose content is stored; without a name the part's own file name is used."""

    kind: UploadKind
    name: str | None


class TextField:
    """A form field that is kept in memory."""


Form = Mapping[str, FileField | TextField]

# What each kind of upload is stored as.
FILE_NAMES: Final[Mapping[UploadKind, str]] = {
    UploadKind.MODEL: "model.onnx",
    UploadKind.DATASET: "data.npz",
    UploadKind.CHECKPOINT: "checkpoint",
}
_EXTERNAL_DATA: Final = FileField(UploadKind.MODEL, None)
UPLOAD_FORMS: Final[Mapping[UploadKind, Form]] = {
    UploadKind.MODEL: {
        "model": FileField(UploadKind.MODEL, FILE_NAMES[UploadKind.MODEL]),
        "external_data": _EXTERNAL_DATA,
    },
    UploadKind.DATASET: {"dataset": FileField(UploadKind.DATASET, FILE_NAMES[UploadKind.DATASET])},
    UploadKind.CHECKPOINT: {
        "checkpoint": FileField(UploadKind.CHECKPOINT, FILE_NAMES[UploadKind.CHECKPOINT])
    },
}
PREPARE_FORM: Final[Form] = {
    **UPLOAD_FORMS[UploadKind.MODEL],
    "calibration": FileField(UploadKind.DATASET, FILE_NAMES[UploadKind.DATASET]),
    "recipe": TextField(),
}


@dataclass
class Received:
    """What a request brought: files in `directory`/KIND/NAME, text fields by their name."""

    directory: Path
    files: dict[UploadKind, list[StoredFile]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)

    def require(self, kind: UploadKind, form_field: str) -> None:
        """Raise `request_invalid` when the main file of that kind has not come."""
        if FILE_NAMES[kind] not in (file.name for file in self.files.get(kind, ())):
            raise ServiceError(
                ServiceErrorCode.REQUEST_INVALID,
                f"The form has no file in its field {form_field!r}.",
                field=form_field,
            )


async def receive_upload(request: Request, kind: UploadKind, directory: Path, settings: Settings) -> Received:
    """Receive one upload: the file as the request's body, or a form with it and what belongs to it.

    Raises:
        ServiceError: `media_type_unsupported`, `request_too_large`, `upload_empty`, `request_invalid`,
            `file_name_invalid`, `external_data_outside`.
    """
    media_type = media_type_of(request)
    if media_type == _MULTIPART:
        form = UPLOAD_FORMS[kind]
        received = await receive_form(request, form, directory, settings)
        received.require(kind, next(iter(form)))
        return received
    if media_type not in _RAW_MEDIA_TYPES:
        raise _unsupported(f"Send the file as application/octet-stream or {_MULTIPART}, not {media_type}.")
    received = Received(directory)
    with closing(_FileSink(received, kind, FILE_NAMES[kind])) as sink:
        async for chunk in bounded_body(request, settings.max_upload_bytes):
            await sink.write(chunk)
        await sink.finish()
    return received


async def receive_form(request: Request, form: Form, directory: Path, settings: Settings) -> Received:
    """Receive a multipart form; errors as for `receive_upload`."""
    if media_type_of(request) != _MULTIPART:
        raise _unsupported(f"Send a form as {_MULTIPART}.")
    received = Received(directory)
    boundary = boundary_of(request.headers["content-type"])
    sink: _FileSink | _TextSink | None = None
    count = 0
    try:
        async for event in read_parts(bounded_body(request, settings.max_upload_bytes), boundary):
            if isinstance(event, PartStart):
                count += 1
                if count > settings.max_upload_files:
                    raise _too_large(f"The form has more than {settings.max_upload_files} parts.")
                sink = _open_sink(event, form, received, settings)
            elif isinstance(event, PartEnd):
                assert sink is not None
                await sink.finish()
                sink.close()
                sink = None
            else:
                assert sink is not None
                await sink.write(event)
    finally:
        if sink is not None:
            sink.close()
    return received


def _open_sink(part: PartStart, form: Form, received: Received, settings: Settings) -> _FileSink | _TextSink:
    target = form.get(part.name)
    if target is None:
        raise ServiceError(
            ServiceErrorCode.REQUEST_INVALID,
            f"The form has an unknown field; the fields are {', '.join(form)}.",
            field=part.name,
        )
    if isinstance(target, TextField):
        return _TextSink(received, part.name, settings.max_request_bytes)
    return _FileSink(received, target.kind, target.name or _external_data_name(part.filename))


def _external_data_name(name: str | None) -> str:
    """The name under which the model refers to the file: one component, nothing that a path could do."""
    if not name or name in FILE_NAMES.values() or len(name.encode()) > 255 or not name.isprintable():
        raise ServiceError(
            ServiceErrorCode.FILE_NAME_INVALID,
            "An external-data file needs a plain file name of its own.",
            field="external_data",
            file=name or None,
        )
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ServiceError(
            ErrorCode.EXTERNAL_DATA_OUTSIDE,
            "An external-data file must have a name without a path; it lies beside the model.",
            field="external_data",
            file=name,
        )
    return name


class _FileSink:
    """A file on its way to disk: hashed and counted as it is written."""

    def __init__(self, received: Received, kind: UploadKind, name: str) -> None:
        self._received = received
        self._kind = kind
        path = received.directory / kind.value / name
        path.parent.mkdir(exist_ok=True)
        try:
            self._file = path.open("xb", buffering=0)
        except FileExistsError as error:
            raise ServiceError(
                ServiceErrorCode.FILE_NAME_INVALID, "Two files of the form have the same name.", file=name
            ) from error
        self._name = name
        self._hash = hashlib.sha256()
        self._size = 0
        self._block = bytearray()

    async def write(self, chunk: bytes) -> None:
        self._block += chunk
        if len(self._block) >= _BLOCK:
            await anyio.to_thread.run_sync(self._flush)

    async def finish(self) -> None:
        await anyio.to_thread.run_sync(self._complete)

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._hash.update(self._block)
        unwritten = memoryview(self._block)
        while unwritten:
            unwritten = unwritten[self._file.write(unwritten) :]
        self._size += len(self._block)
        self._block = bytearray()

    def _complete(self) -> None:
        self._flush()
        if self._size == 0:
            raise ServiceError(ServiceErrorCode.UPLOAD_EMPTY, "The file is empty.", file=self._name)
        os.fchmod(self._file.fileno(), 0o444)
        stored = StoredFile(name=self._name, bytes=self._size, sha256=self._hash.hexdigest())
        self._received.files.setdefault(self._kind, []).append(stored)


class _TextSink:
    """A short text field."""

    def __init__(self, received: Received, name: str, limit: int) -> None:
        self._received = received
        self._name = name
        self._limit = limit
        self._value = b""

    async def write(self, chunk: bytes) -> None:
        self._value += chunk
        if len(self._value) > self._limit:
            raise _too_large(f"The field is larger than {self._limit} bytes.", field=self._name)

    async def finish(self) -> None:
        if self._name in self._received.texts:
            raise ServiceError(
                ServiceErrorCode.REQUEST_INVALID, "The form has the field twice.", field=self._name
            )
        self._received.texts[self._name] = self._value

    def close(self) -> None:
        """Nothing to release."""


async def bounded_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body as it arrives; `request_too_large` when there is more than that many bytes."""
    message = f"The request is larger than {limit} bytes."
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(message)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(message)
        yield chunk


def media_type_of(request: Request) -> str:
    """The media type of the request's body, without parameters; empty when it names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unsupported(detail: str) -> ServiceError:
    return ServiceError(ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED, detail)


def _too_large(detail: str, field: str | None = None) -> ServiceError:
    return ServiceError(ServiceErrorCode.REQUEST_TOO_LARGE, detail, field=field)
