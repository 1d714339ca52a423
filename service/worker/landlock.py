"""Linux's Landlock (landlock(7)): which files a process reaches, TCP, and signals to others.

The kernel has it from 5.13; what a later version of its interface (ABI) added is used where it is there.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from service.worker import kernel

# System calls have these numbers on all architectures.
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446

# include/uapi/linux/landlock.h
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REMOVE_DIR: Final = 1 << 4
_REMOVE_FILE: Final = 1 << 5
_MAKE_DIR: Final = 1 << 7
_MAKE_REG: Final = 1 << 8
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14
# ABI -> all rights to files that it knows, the last number to be used for later ones too.
_FILE_RIGHTS: Final = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    4: (1 << 15) - 1,
    5: (1 << 16) - 1,
}
_TCP_RIGHTS: Final = (4, 0b11)  # since ABI, rights: bind, connect
_SCOPES: Final = (6, 0b11)  # since ABI, scopes: abstract Unix sockets, signals

# Nothing may be executed, and no device, socket, pipe or link be made.
_READ: Final = _READ_FILE | _READ_DIR
_WRITE: Final = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
_OF_DIRECTORIES: Final = _READ_DIR | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER


@dataclasses.dataclass(frozen=True)
class Access:
    """Files that stay reachable; a directory stands for all beneath it. What does not exist is left out."""

    read: Iterable[Path] = ()
    list: Iterable[Path] = ()
    """Directories whose names stay visible, and not what is in their files."""
    write: Iterable[Path] = ()


def version() -> int:
    """The kernel's Landlock ABI; 0 without it."""
    if sys.platform != "linux":
        return 0
    try:
        return kernel.syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(access: Access) -> None:
    """Deny this thread, and all it starts, whatever `access` does not allow. Needs no_new_privs.

    Raises:
        OSError: the kernel says no.
    """
    abi = version()
    handled = _FILE_RIGHTS[min(abi, max(_FILE_RIGHTS))]
    attributes = struct.pack(
        "=QQQ", handled, *(rights if abi >= since else 0 for since, rights in (_TCP_RIGHTS, _SCOPES))
    )
    ruleset = kernel.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    for paths, rights in ((access.read, _READ), (access.list, _READ_DIR), (access.write, _WRITE)):
        for path in paths:
            _allow(ruleset, path, rights & handled)
    kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        # Never closed: a rule is about an inode, and /proc forgets the inodes of what nobody holds.
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= ~_OF_DIRECTORIES
    rule = struct.pack("=Qi", rights, descriptor)
    kernel.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
