"""Queries on uploads."""

from __future__ import annotations

from sqlalchemy.orm import Session

from service.uploads.models import UploadKind, UploadRow


def find(session: Session, kind: UploadKind, identifier: str) -> UploadRow | None:
    return session.get(UploadRow, (kind.value, identifier))


def add(session: Session, row: UploadRow) -> None:
    session.add(row)
    session.flush()
