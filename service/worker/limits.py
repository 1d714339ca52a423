"""What a job's process denies itself: resources beyond its limits, and writing outside its directory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Final

from service.worker.order import Limits

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

# Linux's Landlock (include/uapi/linux/landlock.h), from 5.13; the system call numbers are those of all
# architectures since they were unified.
_SYS_CREATE_RULESET: Final = 444
_SYS_ADD_RULE: Final = 445
_SYS_RESTRICT_SELF: Final = 446
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_WRITE_FILE: Final = 1 << 1
_REMOVE_MAKE: Final = sum(1 << bit for bit in range(4, 13))  # REMOVE_DIR .. MAKE_SYM
_REFER: Final = 1 << 13  # from ABI 2
_TRUNCATE: Final = 1 << 14  # from ABI 3
# Opening /dev/null for writing, and GPUs; device nodes are guarded by their own permissions.
_DEVICES: Final = Path("/dev")


def die_with(supervisor_pid: int) -> None:
    """Have this process killed when its supervisor dies, so that nobody works for a dead service."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor_pid:  # it died before the call above
        os._exit(1)


def apply_limits(limits: Limits, scratch: Path) -> None:
    """Set the resource limits and confine writes to the scratch directory, where the system can."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits.cpu_seconds, grace=5)  # SIGXCPU, then SIGKILL
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    if sys.platform == "linux":
        # When memory runs out, the kernel ends the job and not the service.
        Path("/proc/self/oom_score_adj").write_text("1000")
    _confine_writes(scratch)


def _limit(kind: int, soft: int | None, grace: int = 0) -> None:
    if soft is None:
        return
    hard = resource.getrlimit(kind)[1]
    wanted = soft + grace if hard == resource.RLIM_INFINITY else min(soft + grace, hard)
    resource.setrlimit(kind, (min(soft, wanted), wanted))


def landlock_version() -> int:
    """ABI version of the kernel's Landlock; 0 without it."""
    if sys.platform != "linux":
        return 0
    version: int = _libc().syscall(_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return max(0, version)


def _confine_writes(scratch: Path) -> None:
    """Allow writing beneath the scratch directory only. No-op without Landlock."""
    libc = _libc()
    abi = landlock_version()
    if abi < 1:
        return
    access = _WRITE_FILE | _REMOVE_MAKE | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    attributes = struct.pack("Q", access)
    ruleset = _checked(libc.syscall(_SYS_CREATE_RULESET, attributes, len(attributes), 0))
    _allow(ruleset, scratch, access)
    _allow(ruleset, _DEVICES, _WRITE_FILE | (access & _TRUNCATE))
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, directory: Path, access: int) -> None:
    parent = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, parent)
        _checked(_libc().syscall(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(parent)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
