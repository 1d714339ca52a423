"""What a job's process uses of that which the kernel cannot limit: disk space, files, threads."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from service.errors import Cause, ServiceErrorCode
from service.worker.limits import Limits

_BLOCK: Final = 512  # of st_blocks, whatever the file system's own is (stat(2))
# A hostile process may nest directories until no path reaches them.
_DEEPEST: Final = 32


def excess(limits: Limits, pid: int | None, scratch: Path) -> Cause | None:
    """The limit that a process is beyond, if any.

    Args:
        pid: None once it has ended, when only what it left in `scratch` counts.
    """
    if pid is not None and limits.threads is not None and _threads(pid) > limits.threads:
        return Cause(
            code=ServiceErrorCode.WORKER_CRASHED,
            detail=f"The process of the job was ended: it has more than {limits.threads} threads.",
        )
    size = 0
    for files, status in enumerate(_written(scratch, pid), start=1):
        size += status.st_blocks * _BLOCK
        if limits.scratch_bytes is not None and size > limits.scratch_bytes:
            return _too_large(f"{limits.scratch_bytes} bytes")
        if limits.scratch_files is not None and files > limits.scratch_files:
            return _too_large(f"{limits.scratch_files} files")
    return None


def _too_large(allowed: str) -> Cause:
    return Cause(
        code=ServiceErrorCode.WORKER_OUTPUT_TOO_LARGE,
        detail=f"The job writes more than the {allowed} that the service allows. Use a smaller model.",
    )


def _threads(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended; or this is no Linux
        return 0
    return int(status.partition("\nThreads:")[2].split(maxsplit=1)[0]) if "\nThreads:" in status else 0


def _written(scratch: Path, pid: int | None) -> Iterator[os.stat_result]:
    """Files and directories in the scratch directory, and files without a name that the process holds."""
    pending = [(scratch, 0)]
    while pending:
        directory, depth = pending.pop()
        for entry in _entries(directory):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:  # removed meanwhile
                continue
            yield status
            if stat.S_ISDIR(status.st_mode) and depth < _DEEPEST:
                pending.append((Path(entry.path), depth + 1))
    if pid is None:
        return
    for entry in _entries(Path(f"/proc/{pid}/fd")):
        try:
            status = entry.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
            yield status


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except OSError:
        return
