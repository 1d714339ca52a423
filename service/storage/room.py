"""Room on the disk that uploads and jobs leave alone: with it the database can be written on a full disk.

Otherwise nothing could be removed to make room, and no job could be said to have ended.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


def is_left(place: Path | int, reserved: int, needed: int = 0) -> bool:
    """Whether the disk of a file or directory has so many bytes beyond those reserved."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize >= reserved + needed


def is_full(error: BaseException) -> bool:
    """Whether the error says that the disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def require(place: Path | int, reserved: int, needed: int) -> None:
    """Raise an OSError as if the disk were full when it has no such room."""
    if not is_left(place, reserved, needed):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
