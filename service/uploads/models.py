"""The tables of uploads and of their content."""

from __future__ import annotations

import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, ForeignKeyConstraint, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime, now
from service.tenants.models import TenantRow


class UploadRow(Base):
    __tablename__ = "uploads"

    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
    used_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)  # sent, or named by a job

    __table_args__ = (Index("uploads_by_use", used_at),)


class BlobRow(Base):
    """Content in the store, kept once whoever uploaded it. Whoever stores or removes it locks its row."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)


class UploadBlobRow(Base):
    """An upload has a file of this content."""

    __tablename__ = "upload_blobs"

    tenant: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    upload: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), ForeignKey(BlobRow.sha256), primary_key=True)

    __table_args__ = (
        ForeignKeyConstraint(
            [tenant, kind, upload], [UploadRow.tenant, UploadRow.kind, UploadRow.id], ondelete="CASCADE"
        ),
        Index("upload_blobs_by_content", sha256),
    )
