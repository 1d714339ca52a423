"""Questions to what may hang, asked so that nothing hangs with it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Probe(Generic[T]):
    """Asks in a thread of its own, and never twice at the same time.

    Whoever asks while an answer is awaited waits for the same one: a database that hangs holds one thread,
    however often one looks.
    """

    def __init__(self, name: str, ask: Callable[[], T], *, fresh_seconds: float = 0) -> None:
        """`fresh_seconds`: for how long an answer is good for others too."""
        self._name = name
        self._ask = ask
        self._fresh_seconds = fresh_seconds
        self._lock = threading.Lock()
        self._answer: Future[T] | None = None
        self._answered_at = 0.0

    def answer(self, timeout_seconds: float) -> T:
        """The answer, or the exception that came instead. Raises: TimeoutError: none came in time."""
        return self._awaited().result(timeout_seconds)

    async def answer_async(self, timeout_seconds: float) -> T:
        """As `answer`, without holding up the event loop."""
        return await asyncio.wait_for(asyncio.wrap_future(self._awaited()), timeout_seconds)

    def _awaited(self) -> Future[T]:
        with self._lock:
            if self._answer is None or (self._answer.done() and not self._is_fresh()):
                self._answer = Future()
                self._answer.set_running_or_notify_cancel()  # nobody's impatience cancels it for others
                threading.Thread(target=self._run, args=(self._answer,), name=self._name, daemon=True).start()
            return self._answer

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._answered_at < self._fresh_seconds

    def _run(self, answer: Future[T]) -> None:
        try:
            value = self._ask()
        except BaseException as error:
            self._answered_at = time.monotonic()
            answer.set_exception(error)
        else:
            self._answered_at = time.monotonic()
            answer.set_result(value)
