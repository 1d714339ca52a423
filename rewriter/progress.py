"""How long work tells its caller where it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with the name of the stage and the share of that stage that is done, 0..1.
Progress = Callable[[str, float], None]


def silent(stage: str, fraction: float) -> None:
    """The progress of a caller who does not ask for any."""
