"""The table of resumable uploads."""

from __future__ import annotations

import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime, now
from service.tenants.models import TenantRow


class ResumableUploadRow(Base):
    """A file that arrives in pieces. What has arrived of it is in a file; how much that is, is its length."""

    __tablename__ = "resumable_uploads"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(32), ForeignKey(TenantRow.id))
    bytes: Mapped[int] = mapped_column(BigInteger)  # of the whole file
    # Upload-Metadata as it came, which has to be returned as it is; the parts of it that mean something.
    upload_metadata: Mapped[str] = mapped_column(String(4096))
    kind: Mapped[str | None] = mapped_column(String(16))
    announced_sha256: Mapped[str | None] = mapped_column(String(64))
    sha256: Mapped[str | None] = mapped_column(String(64))  # of the content, once all has arrived
    stored_as: Mapped[str | None] = mapped_column(String(16))  # kind of the upload that has the content now
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
    expires_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("resumable_uploads_by_expiry", "expires_at"),
        Index("resumable_uploads_by_tenant", "tenant"),
    )
