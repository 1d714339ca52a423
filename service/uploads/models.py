"""The table of uploads."""

from __future__ import annotations

import datetime
import enum
from typing import Any

from sqlalchemy import JSON, BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime, now


class UploadKind(enum.StrEnum):
    """What an upload is used as. The value names its collection in paths."""

    MODEL = "models"
    DATASET = "datasets"
    CHECKPOINT = "checkpoints"


class UploadRow(Base):
    __tablename__ = "uploads"

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    created_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime, default=now)
