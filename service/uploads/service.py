"""Uploads: stored once under the digest of their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from rewriter import ErrorCode
from service.database import Database
from service.errors import AnyErrorCode, ServiceError, ServiceErrorCode
from service.storage import DataDirectory, publish
from service.uploads import repository
from service.uploads.models import UploadKind, UploadRow
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile, Upload

NOT_FOUND_CODES: Final[dict[UploadKind, AnyErrorCode]] = {
    UploadKind.MODEL: ErrorCode.MODEL_NOT_FOUND,
    UploadKind.DATASET: ErrorCode.DATA_NOT_FOUND,
    UploadKind.CHECKPOINT: ServiceErrorCode.CHECKPOINT_NOT_FOUND,
}


class UploadService:
    """Stores and finds uploads."""

    def __init__(self, database: Database, data: DataDirectory) -> None:
        self._database = database
        self._data = data

    def store(self, received: Received, kind: UploadKind) -> tuple[Upload, bool]:
        """Keep the received files of that kind; the flag says whether they are new."""
        files = sorted(received.files[kind], key=lambda file: file.name)
        identifier = _content_id(files)
        # The files first: a row never refers to files that are not there.
        publish(received.directory / kind.value, self.path(kind, identifier))
        with self._database.writing() as session:
            row = repository.find(session, kind, identifier)
            is_new = row is None
            if row is None:
                row = UploadRow(
                    kind=kind.value,
                    id=identifier,
                    bytes=sum(file.bytes for file in files),
                    files=[file.model_dump() for file in files],
                )
                repository.add(session, row)
        return Upload.model_validate(row), is_new

    def get(self, kind: UploadKind, identifier: str) -> Upload:
        """Raises: ServiceError: `model_not_found`, `data_not_found` or `checkpoint_not_found`."""
        with self._database.reading() as session:
            row = repository.find(session, kind, identifier)
        if row is None:
            raise ServiceError(NOT_FOUND_CODES[kind], f"There is no {kind.value} upload with this id.")
        return Upload.model_validate(row)

    def path(self, kind: UploadKind, identifier: str) -> Path:
        """Directory of an upload's files."""
        return self._data.upload(kind.value, identifier)


def _content_id(files: list[StoredFile]) -> str:
    """A single file's own SHA-256, so that a client can know the id beforehand; else that of the listing."""
    if len(files) == 1:
        return files[0].sha256
    listing = json.dumps([[file.name, file.sha256] for file in files])
    return hashlib.sha256(listing.encode()).hexdigest()
