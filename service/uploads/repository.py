"""Queries on uploads and their content."""

from __future__ import annotations

import datetime

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from service.database import now
from service.uploads.kinds import UploadKind
from service.uploads.models import BlobRow, UploadBlobRow, UploadRow
from service.uploads.schemas import StoredFile


def find(session: Session, tenant: str, kind: UploadKind, identifier: str) -> UploadRow | None:
    return session.get(UploadRow, (tenant, kind.value, identifier))


def use(session: Session, tenant: str, kind: UploadKind, identifier: str) -> UploadRow | None:
    """An upload that somebody uses now; it is not removed before the transaction ends."""
    row = session.get(UploadRow, (tenant, kind.value, identifier), with_for_update={"key_share": True})
    if row is not None:
        row.used_at = now()
        session.flush()
    return row


def add(session: Session, row: UploadRow) -> None:
    """Add an upload whose content is locked (`lock_blob`)."""
    session.add(row)
    session.flush()
    for digest in {file["sha256"] for file in row.files}:
        session.add(UploadBlobRow(tenant=row.tenant, kind=row.kind, upload=row.id, sha256=digest))
    session.flush()


def content_bytes(session: Session, tenant: str, sha256: str) -> int | None:
    """Size of content that some upload of the tenant has."""
    return session.scalar(
        select(BlobRow.bytes)
        .join(UploadBlobRow, UploadBlobRow.sha256 == BlobRow.sha256)
        .where(UploadBlobRow.tenant == tenant, BlobRow.sha256 == sha256)
        .limit(1)
    )


def lock_blob(session: Session, file: StoredFile) -> None:
    """Keep content from being removed until the transaction ends; its row is made if there is none."""
    if session.get(BlobRow, file.sha256, with_for_update=True) is None:
        session.add(BlobRow(sha256=file.sha256, bytes=file.bytes))
        session.flush()


def lock_unreferenced_blob(session: Session, before: datetime.datetime, after: str) -> BlobRow | None:
    """The next content behind that digest, stored before that time, that no upload had when the query began.

    By the time the row is locked an upload may have it (`is_blob_referenced`): PostgreSQL reads everything
    as it was when the query began, and a row that was only locked meanwhile counts as unchanged.
    """
    return session.scalar(
        select(BlobRow)
        .where(
            BlobRow.created_at < before,
            BlobRow.sha256 > after,
            ~exists().where(UploadBlobRow.sha256 == BlobRow.sha256),
        )
        .order_by(BlobRow.sha256)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def is_blob_referenced(session: Session, blob: BlobRow) -> bool:
    """Whether an upload has this content; while its row is locked, none comes to have it."""
    return session.scalar(select(exists().where(UploadBlobRow.sha256 == blob.sha256))) or False


def stored_bytes(session: Session) -> int:
    """Of all content, each counted once."""
    return int(session.scalar(select(func.sum(BlobRow.bytes))) or 0)
