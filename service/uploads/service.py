"""Uploads: content is stored once under its digest, and belongs to every tenant that uploaded it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sqlalchemy.orm import Session

from rewriter import ErrorCode
from service.database import Database, now
from service.errors import AnyErrorCode, ServiceError, ServiceErrorCode
from service.metrics.instruments import UPLOAD_BYTES
from service.storage.store import Store, blob_key
from service.tenants import quotas
from service.tenants import repository as tenants
from service.tenants.models import TenantRow
from service.uploads import repository
from service.uploads.kinds import SINGULAR, UploadKind
from service.uploads.models import UploadRow
from service.uploads.receiving import Received
from service.uploads.schemas import Upload, content_id

NOT_FOUND_CODES: Final[dict[UploadKind, AnyErrorCode]] = {
    UploadKind.MODEL: ErrorCode.MODEL_NOT_FOUND,
    UploadKind.DATASET: ErrorCode.DATA_NOT_FOUND,
    UploadKind.CHECKPOINT: ServiceErrorCode.CHECKPOINT_NOT_FOUND,
}


class UploadService:
    """Stores and finds uploads. Safe to use from several threads and processes."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store

    def store(
        self,
        tenant: str,
        received: Received,
        kind: UploadKind,
        *,
        release: Callable[[Session], None] | None = None,
    ) -> tuple[Upload, bool]:
        """Keep the received files of that kind; the flag says whether they are new to the tenant.

        A file that is listed and not in the directory is one whose content is in the store.

        Args:
            release: done in the transaction that adds the upload, before its bytes are counted: frees what
                was reserved for them.

        Raises:
            ServiceError: `storage_quota_exceeded`; `content_not_found`, when the store has no such content.
        """
        files = sorted(received.files[kind], key=lambda file: file.name)
        identifier = content_id(files)
        size = sum(file.bytes for file in files)
        # In one order for everybody, so that no two transactions wait for each other.
        contents = {file.sha256: file for file in sorted(files, key=lambda file: file.sha256)}
        directory = received.directory / kind.value

        def keep_contents() -> None:
            for digest, file in contents.items():
                if self._store.exists(blob_key(digest)):
                    continue
                if not (directory / file.name).exists():
                    raise _content_not_found(
                        digest, f"The content of {file.name!r} was removed; upload it again."
                    )
                self._store.put(blob_key(digest), directory / file.name)

        def announce(session: Session) -> None:
            for file in contents.values():
                repository.lock_blob(session, file)

        def begin(session: Session) -> None:
            # Not to store in vain; what decides is the count in the transaction that adds the upload.
            if release is None and repository.find(session, tenant, kind, identifier) is None:
                quotas.require_bytes(session, session.get_one(TenantRow, tenant), size)
            announce(session)

        def find_or_add(session: Session) -> tuple[UploadRow, bool]:
            owner = tenants.locked(session, tenant)
            if release is not None:
                release(session)
            known = repository.use(session, tenant, kind, identifier)
            if known is not None:
                return known, False
            quotas.require_bytes(session, owner, size)
            # Between the two transactions the content may have been removed as belonging to nobody.
            # From here on that waits for this one, which makes it belong to somebody.
            announce(session)
            keep_contents()
            row = UploadRow(
                tenant=tenant,
                kind=kind.value,
                id=identifier,
                bytes=size,
                files=[file.model_dump() for file in files],
            )
            repository.add(session, row)
            return row, True

        # Before anything is stored it has a row, so that nothing is in the store that nobody knows of.
        # What takes long is done outside of transactions; the upload's own row comes last.
        self._database.write(begin)
        keep_contents()
        row, is_new = self._database.write(find_or_add)
        UPLOAD_BYTES.labels(kind.value).observe(row.bytes)
        return Upload.model_validate(row), is_new

    def content_bytes(self, tenant: str, sha256: str, field: str) -> int:
        """Size of content that one of the tenant's uploads has.

        Args:
            field: request field that names it, for errors.

        Raises:
            ServiceError: `content_not_found`.
        """
        with self._database.reading() as session:
            size = repository.content_bytes(session, tenant, sha256)
        if size is None:
            raise _content_not_found(sha256, "None of your uploads has this content; upload it.", field)
        return size

    def get(self, tenant: str, kind: UploadKind, identifier: str) -> Upload:
        """Raises: ServiceError: `model_not_found`, `data_not_found` or `checkpoint_not_found`."""
        with self._database.reading() as session:
            return Upload.model_validate(found(repository.find(session, tenant, kind, identifier), kind))

    def hold(self, session: Session, tenant: str, kind: UploadKind, identifier: str) -> None:
        """Keep an upload from being removed until the transaction ends; errors as for `get`."""
        found(repository.use(session, tenant, kind, identifier), kind)

    def fetch(self, tenant: str, kind: UploadKind, identifier: str, directory: Path) -> None:
        """Make an upload's files available in a directory, which is made, under their own names.

        Raises:
            ServiceError: as for `get`.
        """
        upload = self.get(tenant, kind, identifier)
        directory.mkdir(parents=True)
        for file in upload.files:
            self._store.fetch(blob_key(file.sha256), directory / file.name, file.sha256)

    def remove_unreferenced(self, older_than: datetime.timedelta) -> int:
        """Remove content that belongs to no upload any more; the number of bytes set free.

        Safe beside uploads of the same content: both lock its row. An upload that comes first makes the
        content belong to somebody; one that comes second finds that it is gone and stores it again.
        """
        freed = 0
        last = ""
        while True:
            with self._database.writing() as session:
                blob = repository.lock_unreferenced_blob(session, now() - older_than, last)
                if blob is None:
                    return freed
                last = blob.sha256
                if repository.is_blob_referenced(session, blob):
                    continue
                # The row last: should this fail half-way, the next call does it again.
                self._store.delete(blob_key(blob.sha256))
                freed += blob.bytes
                session.delete(blob)


def found(row: UploadRow | None, kind: UploadKind) -> UploadRow:
    """Raises: ServiceError: `model_not_found`, `data_not_found` or `checkpoint_not_found` without a row."""
    if row is None:
        raise ServiceError(NOT_FOUND_CODES[kind], f"There is no {SINGULAR[kind]} with this id.")
    return row


def _content_not_found(sha256: str, detail: str, field: str | None = None) -> ServiceError:
    return ServiceError(ServiceErrorCode.CONTENT_NOT_FOUND, f"{detail} Its SHA-256: {sha256}.", field=field)
