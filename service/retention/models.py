"""The tables of what is kept how long, and of files that are to be removed."""

from __future__ import annotations

import datetime

from sqlalchemy import Double, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, UtcDateTime


class RetentionPolicyRow(Base):
    """The operator's setting, in a row that is the only one."""

    __tablename__ = "retention_policy"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, default=1)
    days: Mapped[float | None] = mapped_column(Double)  # none: for ever


class ResultRemovalRow(Base):
    """The files of a job that is gone, until they are gone too. Written in the job's last transaction."""

    __tablename__ = "result_removals"

    job: Mapped[str] = mapped_column(String(32), primary_key=True)
    due_at: Mapped[datetime.datetime] = mapped_column(UtcDateTime)

    __table_args__ = (Index("result_removals_due", due_at),)
