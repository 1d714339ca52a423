"""A file that says by its age whether a worker lives: for health checks where there is no port to ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_SECONDS: Final = 5.0


@contextmanager
def kept_fresh(file: Path | None, is_alive: Callable[[], bool]) -> Iterator[None]:
    """Within the block the file is touched every 5 seconds as long as `is_alive()`; then it is removed."""
    if file is None:
        yield
        return
    stopping = threading.Event()

    def work() -> None:
        while is_alive():
            file.touch()
            if stopping.wait(_SECONDS):
                break

    thread = threading.Thread(target=work, name="alive")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        file.unlink(missing_ok=True)
