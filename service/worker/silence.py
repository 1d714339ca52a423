"""How long nothing has changed, without comparing the clocks of two machines."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

_SIGNS: Final = 6

Sign = TypeVar("Sign", bound=Hashable)


def sign_interval(lease_seconds: float) -> float:
    """How often a worker gives a sign of life, and others look for one: several times in a lease, so that one
    that comes late loses nothing."""
    return lease_seconds / _SIGNS


class Silence(Generic[Sign]):
    """For how long each sign of life has stayed the same, by the monotonic clock of whoever looks."""

    def __init__(self, interval: float) -> None:
        """`interval`: seconds between two looks."""
        self.watched_seconds = 0.0
        self._longest = 2 * interval
        self._looked_at: float | None = None
        self._seconds: dict[Sign, float] = {}

    def look(self, signs: Callable[[], Iterable[Sign]], moment: float) -> dict[Sign, float]:
        """The signs that are there now, with the seconds for which they have been; `moment` is now."""
        elapsed = 0.0 if self._looked_at is None else moment - self._looked_at
        # When this process itself stood still, or the database did, so perhaps did the workers: what could
        # not be seen does not count as silence.
        elapsed = min(elapsed, self._longest)
        found = signs()
        self._looked_at = moment
        self.watched_seconds += elapsed
        known = self._seconds
        self._seconds = {sign: known[sign] + elapsed if sign in known else 0.0 for sign in found}
        return self._seconds
