"""Which processes run jobs, busy or not: each gives signs of life, and the APIs watch (PostgreSQL only).

As with leases nobody compares clocks: a process raises its heartbeat, and others see that it has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from service.database import Database
from service.jobs.leases import new_worker_name
from service.worker import repository
from service.worker.periodic import Periodic
from service.worker.silence import Silence, sign_interval


class Sign(NamedTuple):
    """What a living process changes."""

    worker: str
    heartbeat: int


class Presence(Periodic):
    """Gives signs of life of this process as long as it takes jobs."""

    def __init__(self, database: Database, lease_seconds: float, is_here: Callable[[], bool]) -> None:
        super().__init__(
            "presence",
            sign_interval(lease_seconds),
            self._tell,
            "cannot tell whether this worker lives, going on",
        )
        self._database = database
        self._is_here = is_here
        self._worker = new_worker_name()
        self._is_known = False

    def stop(self) -> None:
        super().stop()
        self._is_here = lambda: False
        self.run_once()

    def _tell(self) -> None:
        if self._is_here():
            with self._database.writing() as session:
                repository.beat(session, self._worker)
            self._is_known = True
        elif self._is_known:
            with self._database.writing() as session:
                repository.remove(session, self._worker)
            self._is_known = False


class Lookout(Periodic):
    """Watches for the signs of life of all processes that run jobs."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        interval = sign_interval(lease_seconds)
        super().__init__("lookout", interval, self._look, "cannot look for workers, going on")
        self._database = database
        self._lease_seconds = lease_seconds
        self._silence = Silence[Sign](interval)
        self._old: set[Sign] | None = None
        self._count: int | None = None

    def count(self) -> int | None:
        """How many have shown life within the time of a lease; None: not known, or not yet."""
        return self._count

    def look(self, moment: float) -> None:
        """Look at all processes; `moment` is the time of a monotonic clock, in seconds."""
        silence = self._silence.look(self._signs, moment)
        # What has been the same since the first look may be what a dead process left.
        self._old = set(silence) if self._old is None else self._old & silence.keys()
        living = {sign for sign, seconds in silence.items() if seconds < self._lease_seconds} - self._old
        # By then each that lives has been seen to change.
        if self._silence.watched_seconds >= self._lease_seconds / 2:
            self._count = len(living)
        silent = [sign for sign, seconds in silence.items() if seconds >= self._lease_seconds]
        if silent:
            with self._database.writing() as session:
                for sign in silent:
                    repository.remove_silent(session, *sign)

    def _signs(self) -> list[Sign]:
        with self._database.reading() as session:
            return [Sign(row.id, row.heartbeat) for row in repository.workers(session)]

    def _look(self) -> None:
        try:
            self.look(time.monotonic())
        except Exception:
            self._count = None
            raise
