"""Request bodies to files: streamed, hashed on the way, bounded, checked for safe names."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fastapi import Request

from rewriter import ErrorCode
from service.errors import ServiceError, ServiceErrorCode
from service.uploads.body import bounded_body, media_type_of
from service.uploads.digests import announced_sha256, require_sha256
from service.uploads.intake import FileWriter, Intake
from service.uploads.kinds import FILE_NAMES, UploadKind
from service.uploads.multipart import PartEnd, PartStart, boundary_of, read_parts
from service.uploads.schemas import StoredFile

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
    "webhook": TextField(),
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


async def receive_upload(request: Request, kind: UploadKind, directory: Path, intake: Intake) -> Received:
    """Receive one upload: the file as the request's body, or a form with it and what belongs to it.

    Raises:
        ServiceError: `media_type_unsupported`, `request_too_large`, `upload_empty`, `request_invalid`,
            `file_name_invalid`, `external_data_outside`, `digest_mismatch`, and those of `bounded_body`.
    """
    media_type = media_type_of(request)
    if media_type == _MULTIPART:
        form = UPLOAD_FORMS[kind]
        received = await receive_form(request, form, directory, intake)
        received.require(kind, next(iter(form)))
        return received
    if media_type not in _RAW_MEDIA_TYPES:
        raise _unsupported(f"Send the file as application/octet-stream or {_MULTIPART}, not {media_type}.")
    announced = announced_sha256(request.headers)
    received = Received(directory)
    with closing(_FileSink(received, kind, FILE_NAMES[kind], intake)) as sink:
        async for piece in bounded_body(request, intake.settings.max_upload_bytes, intake):
            await sink.write(piece)
        await sink.finish()
    require_sha256(announced, received.files[kind][0].sha256, FILE_NAMES[kind])
    return received


async def receive_form(request: Request, form: Form, directory: Path, intake: Intake) -> Received:
    """Receive a multipart form; errors as for `receive_upload`."""
    if media_type_of(request) != _MULTIPART:
        raise _unsupported(f"Send a form as {_MULTIPART}.")
    received = Received(directory)
    boundary = boundary_of(request.headers["content-type"])
    limit = intake.settings.max_upload_files
    body = bounded_body(request, intake.settings.max_upload_bytes, intake)
    sink: _FileSink | _TextSink | None = None
    count = 0
    try:
        async for event in read_parts(_checked(body, announced_sha256(request.headers), intake), boundary):
            if isinstance(event, PartStart):
                count += 1
                if count > limit:
                    raise _too_large(f"The form has more than {limit} parts.")
                sink = _open_sink(event, form, received, intake)
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


async def _checked(body: AsyncIterator[bytes], announced: str | None, intake: Intake) -> AsyncIterator[bytes]:
    """The pieces of a form, whose digest, if one is announced, is that of the whole body and no file's."""
    if announced is None:
        async for piece in body:
            yield piece
        return
    digest = hashlib.sha256()
    async for piece in body:
        await intake.write(digest.update, piece)
        yield piece
    require_sha256(announced, digest.hexdigest())


def _open_sink(part: PartStart, form: Form, received: Received, intake: Intake) -> _FileSink | _TextSink:
    target = form.get(part.name)
    if target is None:
        raise ServiceError(
            ServiceErrorCode.REQUEST_INVALID,
            f"The form has an unknown field; the fields are {', '.join(form)}.",
            field=part.name,
        )
    if isinstance(target, TextField):
        return _TextSink(received, part.name, intake.settings.max_request_bytes)
    return _FileSink(received, target.kind, target.name or external_data_name(part.filename), intake)


def external_data_name(name: str | None, field: str = "external_data") -> str:
    """The name under which the model refers to the file: one component, nothing that a path could do.

    Args:
        field: of the request, that has the name.

    Raises:
        ServiceError: `file_name_invalid`, `external_data_outside`.
    """
    if not name or name in FILE_NAMES.values() or len(name.encode()) > 255 or not name.isprintable():
        raise ServiceError(
            ServiceErrorCode.FILE_NAME_INVALID,
            "An external-data file needs a plain file name of its own.",
            field=field,
            file=name or None,
        )
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ServiceError(
            ErrorCode.EXTERNAL_DATA_OUTSIDE,
            "An external-data file must have a name without a path; it lies beside the model.",
            field=field,
            file=name,
        )
    return name


class _FileSink:
    """A file on its way to disk: hashed and counted as it is written."""

    def __init__(self, received: Received, kind: UploadKind, name: str, intake: Intake) -> None:
        self._received = received
        self._kind = kind
        self._name = name
        self._hash = hashlib.sha256()
        self._size = 0
        path = received.directory / kind.value / name
        path.parent.mkdir(exist_ok=True)
        try:
            self._writer = FileWriter(intake, path.open("xb", buffering=0), self._hash)
        except FileExistsError as error:
            raise ServiceError(
                ServiceErrorCode.FILE_NAME_INVALID, "Two files of the form have the same name.", file=name
            ) from error

    async def write(self, piece: bytes) -> None:
        self._size += len(piece)
        await self._writer.write(piece)

    async def finish(self) -> None:
        if self._size == 0:
            raise ServiceError(ServiceErrorCode.UPLOAD_EMPTY, "The file is empty.", file=self._name)
        await self._writer.flush()
        stored = StoredFile(name=self._name, bytes=self._size, sha256=self._hash.hexdigest())
        self._received.files.setdefault(self._kind, []).append(stored)

    def close(self) -> None:
        self._writer.close()


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


def _unsupported(detail: str) -> ServiceError:
    return ServiceError(ServiceErrorCode.MEDIA_TYPE_UNSUPPORTED, detail)


def _too_large(detail: str, field: str | None = None) -> ServiceError:
    return ServiceError(ServiceErrorCode.REQUEST_TOO_LARGE, detail, field=field)
