"""How long things are kept: one policy for all processes, which the database holds.

`onnx-qat serve` writes it there, and every process goes by what is there. Were each to go by its own
environment, those that do not agree would undo each other's dates for ever.
"""

from __future__ import annotations

import datetime

from sqlalchemy.orm import Session

from service.database import now
from service.retention import repository
from service.settings import LONGEST_RETENTION_DAYS


class Retention:
    """The policy as this process last read it. Safe to use from several threads."""

    def __init__(self) -> None:
        self.span: datetime.timedelta | None = None
        """None: everything is kept for ever."""

    def read(self, session: Session) -> bool:
        """Learn the policy; false as long as nobody has set one."""
        row = repository.policy(session)
        self.span = None if row is None or row.days is None else _span(row.days)
        return row is not None

    def expiry(self) -> datetime.datetime | None:
        """When a job is removed that ends now, or that somebody asks for now; None: not by itself."""
        span = self.span  # another thread may read the policy meanwhile
        return None if span is None else now() + span


def _span(days: float) -> datetime.timedelta:
    """The time itself; a row from before settings had bounds may say what no date can hold."""
    return datetime.timedelta(days=max(0.0, min(LONGEST_RETENTION_DAYS, days)))
