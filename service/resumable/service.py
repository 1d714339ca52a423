"""Uploads that arrive in pieces and survive broken connections and restarts of the service.

What has arrived of an upload is a file, PARTIAL/ID, that only grows; its length is the offset. Whoever uses
it holds a lock on it, which ends with the process at the latest. Several API processes may share the
directory, if its file system passes locks on (local ones, NFS 4).

SHA-256 runs along while the pieces arrive in one process. Where another one goes on (after a restart) the
content is read once more when it is complete: the running state cannot be kept, and reading costs the same
whether it is done when an upload is resumed or at its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import os
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session

from service.database import Database, now
from service.errors import ServiceError, ServiceErrorCode
from service.resumable import repository
from service.resumable.headers import Metadata
from service.resumable.models import ResumableUploadRow
from service.settings import Settings
from service.storage.directory import DataDirectory
from service.tenants import quotas
from service.tenants import repository as tenants
from service.uploads.digests import require_sha256
from service.uploads.kinds import FILE_NAMES, UploadKind
from service.uploads.receiving import Received
from service.uploads.schemas import StoredFile
from service.uploads.service import UploadService

if TYPE_CHECKING:
    from hashlib import _Hash

# Unfinished uploads whose SHA-256 this process remembers; more are read again at their end.
_REMEMBERED: Final = 1000


@dataclass(frozen=True)
class Progress:
    """How far an upload has come. `stored_as` is the kind of upload that its content belongs to."""

    id: str
    offset: int
    bytes: int
    metadata: str
    expires_at: datetime.datetime
    sha256: str | None
    stored_as: UploadKind | None


class Part:
    """What has arrived of an upload, locked. `digest`, if known, is that of all of the file."""

    def __init__(self, row: ResumableUploadRow, file: IO[Any], offset: int, digest: _Hash | None) -> None:
        self.row: Final = row
        self.file: Final = file
        # A finished upload's file may be gone.
        self.offset: Final = offset if row.sha256 is None else row.bytes
        self.digest = digest
        self._digest_before = None if digest is None else digest.copy()

    def take_back(self) -> None:
        """Forget what was appended since the part was opened."""
        descriptor = self.file.fileno()
        if os.fstat(descriptor).st_size > self.offset:
            os.ftruncate(descriptor, self.offset)
        self.digest = self._digest_before


class ResumableUploads:
    """Begins, continues, finishes and removes uploads. Safe to use from several threads and processes."""

    def __init__(
        self, settings: Settings, data: DataDirectory, database: Database, uploads: UploadService
    ) -> None:
        self._lifetime = datetime.timedelta(seconds=settings.resumable_upload_seconds)
        self._largest = settings.max_upload_bytes
        self._data = data
        self._database = database
        self._uploads = uploads
        # By upload: the state of SHA-256 and after how many bytes that is.
        self._digests: OrderedDict[str, tuple[int, _Hash]] = OrderedDict()

    def create(self, tenant: str, size: int, metadata: Metadata) -> Progress:
        """Begin an upload of that many bytes.

        Raises:
            ServiceError: `request_too_large`, `upload_empty`, `storage_quota_exceeded`.
        """
        if size > self._largest:
            raise ServiceError(
                ServiceErrorCode.REQUEST_TOO_LARGE,
                f"An upload may have {self._largest} bytes.",
                field="Upload-Length",
            )
        if size == 0:
            raise ServiceError(ServiceErrorCode.UPLOAD_EMPTY, "The file is empty.", field="Upload-Length")
        row = ResumableUploadRow(
            id=uuid.uuid4().hex,
            tenant=tenant,
            bytes=size,
            upload_metadata=metadata.text,
            kind=metadata.kind,
            announced_sha256=metadata.sha256,
            expires_at=now() + self._lifetime,
        )
        with self._database.writing() as session:
            quotas.require_bytes(session, tenants.locked(session, tenant), size)
            session.add(row)
        return _progress(row, 0)

    def open(self, tenant: str, identifier: str) -> Part:
        """Lock an upload; whoever closes the part's file ends that.

        Raises:
            ServiceError: `upload_not_found`, `upload_expired`, `upload_locked`.
        """
        self._row(tenant, identifier)
        file = _opened(self._data.partial / identifier)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have changed or removed it.
            row = self._row(tenant, identifier)
        except BaseException as error:
            file.close()
            if isinstance(error, BlockingIOError):
                raise ServiceError(
                    ServiceErrorCode.UPLOAD_LOCKED,
                    "Another request for this upload is not finished; try again.",
                ) from error
            raise
        offset = os.fstat(file.fileno()).st_size
        return Part(row, file, offset, self._recall(identifier, offset))

    def finish(self, part: Part) -> Progress:
        """How far it is, once that is safe on disk; if it is complete, store it as its metadata says.

        Raises:
            ServiceError: `digest_mismatch`, after which the upload is gone.
        """
        row = part.row
        path = self._data.partial / row.id
        if row.sha256 is not None:
            if row.stored_as is not None:
                path.unlink(missing_ok=True)  # opening it made it again
            return _progress(row, row.bytes)
        descriptor = part.file.fileno()
        os.fdatasync(descriptor)
        offset = os.fstat(descriptor).st_size
        if offset < row.bytes:
            if offset > part.offset:
                row = self._changed(row.id, expires_at=now() + self._lifetime)
            self._remember(row.id, offset, part.digest)
            return _progress(row, offset)
        sha256 = _sha256(path, part)
        try:
            require_sha256(row.announced_sha256, sha256)
        except ServiceError:
            self._remove(row.id)
            raise
        if row.kind is None:
            return _progress(self._changed(row.id, sha256=sha256, expires_at=now() + self._lifetime), offset)
        kind = UploadKind(row.kind)
        with self._data.staged() as directory:
            file = StoredFile(name=FILE_NAMES[kind], bytes=offset, sha256=sha256)
            (directory / kind.value).mkdir()
            os.link(path, directory / kind.value / file.name)
            self._uploads.store(
                row.tenant,
                Received(directory, {kind: [file]}),
                kind,
                release=lambda session: give_over(session, row.id, kind, sha256),
            )
        path.unlink()
        return dataclasses.replace(_progress(row, offset), sha256=sha256, stored_as=kind)

    def give(self, tenant: str, identifier: str, target: Path, field: str) -> StoredFile:
        """Give a finished upload's file a second name, unless a stored upload has the content already.

        Args:
            field: request field that names the upload, for errors.

        Raises:
            ServiceError: `upload_not_found`, `upload_expired`, `upload_unfinished`.
        """
        row = self._row(tenant, identifier, field)
        if row.sha256 is None:
            raise ServiceError(
                ServiceErrorCode.UPLOAD_UNFINISHED, "The resumable upload is not complete.", field=field
            )
        with contextlib.suppress(FileNotFoundError):
            os.link(self._data.partial / identifier, target)
        return StoredFile(name=target.name, bytes=row.bytes, sha256=row.sha256)

    def drop(self, identifier: str) -> None:
        """Remove the file of an upload that was given over."""
        (self._data.partial / identifier).unlink(missing_ok=True)

    def remove(self, tenant: str, identifier: str) -> None:
        """End an upload; what was stored from it stays.

        Raises:
            ServiceError: `upload_not_found`, `upload_expired`, `upload_locked`.
        """
        with contextlib.closing(self.open(tenant, identifier).file):
            self._remove(identifier)

    def remove_expired(self) -> int:
        """Remove what has expired, and what a crash left without a row; how many that are."""
        # Listed first: a file whose row comes later than our look at the rows is not among them.
        files = {path.name for path in self._data.partial.iterdir()}
        with self._database.reading() as session:
            candidates = [*repository.expired(session, now()), *(files - repository.all_ids(session))]
        return sum(self._remove_if_expired(identifier) for identifier in candidates)

    def _remove_if_expired(self, identifier: str) -> bool:
        with _opened(self._data.partial / identifier) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            with self._database.reading() as session:
                row = session.get(ResumableUploadRow, identifier)
            if row is not None and row.expires_at >= now():  # it grew meanwhile
                return False
            self._remove(identifier)
        return True

    def _row(self, tenant: str, identifier: str, field: str | None = None) -> ResumableUploadRow:
        with self._database.reading() as session:
            row = repository.find(session, tenant, identifier)
        if row is None:
            raise ServiceError(
                ServiceErrorCode.UPLOAD_NOT_FOUND, "There is no resumable upload with this id.", field=field
            )
        if row.expires_at < now():
            raise ServiceError(
                ServiceErrorCode.UPLOAD_EXPIRED, "The upload has expired; begin again.", field=field
            )
        return row

    def _changed(self, identifier: str, **values: Any) -> ResumableUploadRow:
        with self._database.writing() as session:
            row = session.get_one(ResumableUploadRow, identifier)
            for name, value in values.items():
                setattr(row, name, value)
        return row

    def _remove(self, identifier: str) -> None:
        # The row first: without it nobody uses the file, and `remove_expired` finds it after a crash.
        with self._database.writing() as session:
            row = session.get(ResumableUploadRow, identifier)
            if row is not None:
                session.delete(row)
        (self._data.partial / identifier).unlink(missing_ok=True)
        self._digests.pop(identifier, None)

    def _remember(self, identifier: str, offset: int, digest: _Hash | None) -> None:
        if digest is None:
            return
        self._digests[identifier] = (offset, digest)
        if len(self._digests) > _REMEMBERED:
            self._digests.popitem(last=False)

    def _recall(self, identifier: str, offset: int) -> _Hash | None:
        """The state of SHA-256 after the first `offset` bytes, if this process saw them all."""
        if offset == 0:
            return hashlib.sha256()
        remembered, digest = self._digests.pop(identifier, (0, None))
        return digest if remembered == offset else None


def _sha256(path: Path, part: Part) -> str:
    if part.digest is not None:
        return part.digest.hexdigest()
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> IO[Any]:
    """Unbuffered, to append to; made if it is not there, as the row comes first.

    What the store has under another name can only be read (`LocalStore.put`): it is complete, though the row
    does not say so when the store's transaction failed.
    """
    try:
        return path.open("ab", buffering=0)
    except PermissionError:
        return path.open("rb", buffering=0)


def give_over(session: Session, identifier: str, kind: UploadKind, sha256: str | None = None) -> None:
    """Within the transaction that stores an upload of that kind: it has the content from now on.

    Raises:
        ServiceError: `upload_expired`, since it was given.
    """
    row = session.get(ResumableUploadRow, identifier, with_for_update=True)
    if row is None:
        raise ServiceError(ServiceErrorCode.UPLOAD_EXPIRED, "The upload has expired; begin again.")
    row.sha256 = sha256 or row.sha256
    row.stored_as = kind.value


def _progress(row: ResumableUploadRow, offset: int) -> Progress:
    return Progress(
        id=row.id,
        offset=offset,
        bytes=row.bytes,
        metadata=row.upload_metadata,
        expires_at=row.expires_at,
        sha256=row.sha256,
        stored_as=None if row.stored_as is None else UploadKind(row.stored_as),
    )
