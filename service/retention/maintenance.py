"""A thread that tidies up from time to time. Each process may have one: every step can run beside itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from service.unavailable import UNAVAILABLE

log = structlog.get_logger()

_INTERVAL_SECONDS: Final = 60.0


class Maintenance:
    """Takes the steps now and then until it is stopped."""

    def __init__(self, steps: Mapping[str, Callable[[], object]]) -> None:
        self._steps = steps
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="maintenance")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the step that is under way."""
        self._stopping.set()
        self._thread.join()

    def run_once(self) -> None:
        """Take every step; one that fails does not keep the others from their work."""
        for name, step in self._steps.items():
            if self._stopping.is_set():
                return
            try:
                step()
            except UNAVAILABLE as error:
                log.warning("a server does not answer; maintenance goes on", step=name, error=str(error))
            except Exception:
                log.exception("maintenance failed, going on", step=name)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self.run_once()
            self._stopping.wait(_INTERVAL_SECONDS)
