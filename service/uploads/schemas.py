"""Uploads as they cross the wire."""

from __future__ import annotations

import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.uploads.models import UploadKind

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
