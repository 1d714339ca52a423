"""Uploads as they cross the wire."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.uploads.kinds import UploadKind

UploadId = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9a-f]{64}$"),
    Field(description="SHA-256 of the content, in hexadecimal"),
]


class StoredFile(BaseModel):
    """A file that the service keeps."""

    model_config = ConfigDict(from_attributes=True, frozen=True)

    name: str
    bytes: int
    sha256: str


class Upload(BaseModel):
    """A model, data set or checkpoint that jobs can refer to by its id."""

    model_config = ConfigDict(from_attributes=True)

    id: UploadId
    kind: UploadKind
    bytes: int = Field(description="size of all files together")
    files: list[StoredFile]
    created_at: datetime.datetime


def content_id(files: Sequence[StoredFile]) -> str:
    """The id of an upload of these files, which a client can thus know beforehand.

    It is a single file's own SHA-256, else that of the JSON array of all [name, SHA-256], by name.
    """
    if len(files) == 1:
        return files[0].sha256
    listing = json.dumps([[file.name, file.sha256] for file in sorted(files, key=lambda file: file.name)])
    return hashlib.sha256(listing.encode()).hexdigest()
