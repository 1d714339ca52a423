"""A worker's sign of life for the job that it runs."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import Final

import structlog

from service.jobs.leases import Claim, Leases
from service.unavailable import UNAVAILABLE

log = structlog.get_logger()

# How soon a cancelled job's process is killed.
_LOOK_SECONDS: Final = 0.5


class Heart:
    """Raises a running job's heartbeat while the `with` block lasts, and watches whether it is still ours."""

    def __init__(self, leases: Leases, claim: Claim, seconds: float) -> None:
        self.lost = threading.Event()
        """Set when the job was cancelled or belongs to another worker now."""
        self._leases = leases
        self._claim = claim
        self._seconds = seconds
        self._stopped = threading.Event()
        # In the context of the job, so that its log lines name it.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="heart", daemon=True
        )

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        beaten_at = time.monotonic()
        while not self._stopped.wait(min(_LOOK_SECONDS, self._seconds)) and not self.lost.is_set():
            is_due = time.monotonic() - beaten_at >= self._seconds
            try:
                held = self._leases.beat(self._claim) if is_due else self._leases.holds(self._claim)
            except UNAVAILABLE as error:
                # Others cannot see the database either, or else they take the job: then we shall learn it.
                log.warning("heartbeat failed, going on", error=str(error))
                continue
            except Exception:
                log.exception("heartbeat failed, going on")
                continue
            if is_due:
                beaten_at = time.monotonic()
            if not held:
                self.lost.set()
