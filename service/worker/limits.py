"""Resources that a job's process may use, and that it dies with its supervisor.

Only the standard library is imported here: the limits are set before anything else is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

from service.worker import kernel

_PR_SET_PDEATHSIG: Final = 1
_CPU_GRACE_SECONDS: Final = 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on one job; None: none of the service's own.

    Attributes:
        cpu_seconds: CPU time of all its threads.
        memory_bytes: address space.
        file_bytes: one file.
        open_files: file descriptors.
        scratch_bytes: disk space of all it writes. The kernel has no such limit: the supervisor looks.
        scratch_files: files and directories it makes; the supervisor looks.
        threads: threads of the process; the supervisor looks. RLIMIT_NPROC is of no use here: it counts all
            processes of the user, so that one job would be refused threads for what others do.
    """

    cpu_seconds: int | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None
    scratch_bytes: int | None = None
    scratch_files: int | None = None
    threads: int | None = None


def die_with(supervisor_pid: int) -> None:
    """Have this process killed when its supervisor dies, so that nobody works for a dead service."""
    if sys.platform == "linux":
        kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:  # it died before the call above
        os._exit(1)


def apply_limits(limits: Limits) -> None:
    """Set what the kernel can limit for this process. Without a capability there is no way back."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits.cpu_seconds, grace=_CPU_GRACE_SECONDS)  # SIGXCPU, then SIGKILL
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    _limit(resource.RLIMIT_NOFILE, limits.open_files)
    if sys.platform == "linux":
        # When memory runs out, the kernel ends the job and not the service.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit(kind: int, soft: int | None, grace: int = 0) -> None:
    if soft is None:
        return
    hard = resource.getrlimit(kind)[1]
    wanted = soft + grace if hard == resource.RLIM_INFINITY else min(soft + grace, hard)
    resource.setrlimit(kind, (min(soft, wanted), wanted))
