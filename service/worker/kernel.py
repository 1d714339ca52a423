"""Calls to the Linux kernel that Python has no function for."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: object) -> int:
    """prctl(2).

    Raises:
        OSError: the kernel says no.
    """
    # Variadic: what is shorter than a register would leave rubbish in the rest of it.
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments]
    missing = [ctypes.c_ulong(0)] * (4 - len(words))
    return _checked(_LIBC.prctl(ctypes.c_int(option), *words, *missing))


def syscall(number: int, *arguments: object) -> int:
    """syscall(2).

    Raises:
        OSError: the kernel says no.
    """
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return _checked(_LIBC.syscall(ctypes.c_long(number), *words))


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
