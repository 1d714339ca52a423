"""What jobs there are and where one stands."""

from __future__ import annotations

import enum
from typing import Final


class JobKind(enum.StrEnum):
    """What a job does."""

    PREPARE = "prepare"
    FINALIZE = "finalize"


class JobState(enum.StrEnum):
    """Where a job stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED: Final = (JobState.QUEUED, JobState.RUNNING)
FINISHED: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# A job that answers for its request; a new one is made when it failed or was cancelled.
ANSWERING: Final = (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED)
