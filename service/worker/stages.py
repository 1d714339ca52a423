"""How long each stage of a job takes: as metrics, and as spans of its trace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from service import tracing
from service.jobs.states import JobKind
from service.metrics.instruments import STAGE_SECONDS

if TYPE_CHECKING:
    from opentelemetry.trace import Span

STAGES: Final = frozenset(
    {
        # Of the service: inputs are fetched, the job's process starts, the result is stored.
        "fetch",
        "start",
        "publish",
        # Of the library.
        "load",
        "normalize",
        "calibrate",
        "write",
        "quantize",
        "verify",
    }
)
_OTHER: Final = "other"
# A job goes through each once. More come from a process that runs a hostile model.
_MOST_SPANS: Final = 32


class Stages:
    """The stages of one job, one after the other. Use as a context manager: the last one ends with it."""

    def __init__(self, kind: JobKind) -> None:
        self._kind = kind
        self._stage: str | None = None
        self._started_at = 0.0
        self._span: Span | None = None
        self._spans = 0

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def enter(self, stage: str) -> None:
        """A stage begins, unless it is under way; what nobody knows is "other"."""
        stage = stage if stage in STAGES else _OTHER
        if stage == self._stage:
            return
        self._end()
        self._stage, self._started_at = stage, time.monotonic()
        if self._spans < _MOST_SPANS:
            self._spans += 1
            self._span = tracing.start_span(stage)

    def _end(self) -> None:
        if self._stage is not None:
            seconds = time.monotonic() - self._started_at
            STAGE_SECONDS.labels(self._kind.value, self._stage).observe(seconds)
            self._stage = None
        if self._span is not None:
            self._span.end()
            self._span = None
