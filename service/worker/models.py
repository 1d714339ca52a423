"""The table of processes that run jobs."""

from __future__ import annotations

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base


class WorkerRow(Base):
    """A process that takes jobs, busy or not. Removed by itself at its end, by others when it is silent."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    heartbeat: Mapped[int] = mapped_column(BigInteger, default=0)  # raised now and then
