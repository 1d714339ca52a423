"""An upload made of files that are there already: resumable uploads, and content that was uploaded before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from sqlalchemy.orm import Session

from service.errors import ServiceError, ServiceErrorCode
from service.resumable.service import ResumableUploads, give_over
from service.uploads.kinds import FILE_NAMES, UploadKind
from service.uploads.receiving import Received, external_data_name
from service.uploads.schemas import StoredFile, Upload, UploadId
from service.uploads.service import UploadService

_Name = Annotated[
    str, Field(description="model.onnx, data.npz, checkpoint, or the name that a model gives its data")
]


class ResumedFile(BaseModel):
    """A file that a resumable upload brought."""

    model_config = ConfigDict(extra="forbid")

    name: _Name
    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="id of a complete resumable upload")]


class KnownFile(BaseModel):
    """A file whose content one of the tenant's uploads has."""

    model_config = ConfigDict(extra="forbid")

    name: _Name
    sha256: UploadId


def _source_of(file: Any) -> str:
    return (KnownFile if isinstance(file, dict) and "sha256" in file else ResumedFile).__name__


# By what is given, so that what is wrong with it is told, and not that the other is missing.
_File = Annotated[
    Annotated[ResumedFile, Tag(ResumedFile.__name__)] | Annotated[KnownFile, Tag(KnownFile.__name__)],
    Discriminator(_source_of),
]


class Assembly(BaseModel):
    """The files of an upload, which are there already."""

    model_config = ConfigDict(extra="forbid")

    files: list[_File] = Field(min_length=1)


def assembly_schema(kind: UploadKind) -> dict[str, Any]:
    """JSON schema of an assembly of that kind: only models have other files beside the main one."""
    main = {"properties": {"name": {"const": FILE_NAMES[kind]}}}
    files = (
        {"contains": main, "maxContains": 1} if kind is UploadKind.MODEL else {"items": main, "maxItems": 1}
    )
    return {"allOf": [{"$ref": "#/components/schemas/Assembly"}, {"properties": {"files": files}}]}


def assemble(
    uploads: UploadService,
    resumable: ResumableUploads,
    tenant: str,
    kind: UploadKind,
    assembly: Assembly,
    directory: Path,
) -> tuple[Upload, bool]:
    """Store an upload of these files; the flag says whether it is new to the tenant.

    Raises:
        ServiceError: `request_invalid`, `file_name_invalid`, `external_data_outside`, `upload_not_found`,
            `upload_expired`, `upload_unfinished`, `content_not_found`, `storage_quota_exceeded`.
    """
    _require_names(kind, assembly)
    files: list[StoredFile] = []
    (directory / kind.value).mkdir()
    for number, file in enumerate(assembly.files):
        target = directory / kind.value / file.name
        if isinstance(file, ResumedFile):
            files.append(resumable.give(tenant, file.upload, target, f"files.{number}.upload"))
        else:
            size = uploads.content_bytes(tenant, file.sha256, f"files.{number}.sha256")
            files.append(StoredFile(name=file.name, bytes=size, sha256=file.sha256))
    # In one order whoever asks: the transaction locks them one after the other.
    resumed = sorted({file.upload for file in assembly.files if isinstance(file, ResumedFile)})

    def release(session: Session) -> None:
        for identifier in resumed:
            give_over(session, identifier, kind)

    stored = uploads.store(tenant, Received(directory, {kind: files}), kind, release=release)
    for identifier in resumed:
        resumable.drop(identifier)
    return stored


def _require_names(kind: UploadKind, assembly: Assembly) -> None:
    names = [file.name for file in assembly.files]
    main = FILE_NAMES[kind]
    if main not in names or (kind is not UploadKind.MODEL and names != [main]):
        others = "may have others beside it" if kind is UploadKind.MODEL else "has no others"
        raise ServiceError(
            ServiceErrorCode.REQUEST_INVALID,
            f"An upload to /v1/{kind.value} has a file named {main} and {others}.",
            field="files",
        )
    for number, name in enumerate(names):
        field = f"files.{number}.name"
        if name in names[:number]:
            raise ServiceError(
                ServiceErrorCode.FILE_NAME_INVALID, "Two files have the same name.", field=field, file=name
            )
        if name != main:
            external_data_name(name, field)
