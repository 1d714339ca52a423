"""A thread that does the same thing again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from service.unavailable import UNAVAILABLE

log = structlog.get_logger()


class Periodic:
    """Calls a function at once and then every so many seconds, in a thread of its own, until it is stopped.

    Whatever the function raises is logged, and the next call comes all the same.
    """

    def __init__(self, name: str, seconds: float, act: Callable[[], object], failure: str) -> None:
        """`failure`: what the log says when the function raises."""
        self._seconds = seconds
        self._act = act
        self._failure = failure
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the call that is under way."""
        self._stopped.set()
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def run_once(self) -> None:
        """Call the function now."""
        try:
            self._act()
        except UNAVAILABLE as error:
            log.warning(self._failure, error=str(error))
        except Exception:
            log.exception(self._failure)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.run_once()
            self._stopped.wait(self._seconds)
