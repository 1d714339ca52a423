"""What the measured processes of `benchmarks.train_step` have in common.

Imports the standard library only: one of them runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], float]


def serve(make: Callable[[], Step], warm_up: int) -> None:
    """Make a training step, run it `warm_up` times, then as often as each line of standard input says.

    The step before the measured ones of a line is not counted: caches held another process's data. Answers
    are lines of JSON, the first one when the warm-up is over. A step returns its loss.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    imports_bytes = peak_bytes()
    step = make()
    losses = [step() for _ in range(warm_up)]
    answer(imports_bytes=imports_bytes, losses=losses)
    for line in sys.stdin:
        step()
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        answer(seconds=seconds, peak_bytes=peak_bytes())


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
