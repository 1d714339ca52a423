"""A seccomp filter (seccomp(2)): system calls that a job's process has no use for.

It denies sockets of every kind, new processes and programs, reaching into other processes, changing owners,
modes and times of files (which Landlock leaves open), memory that the limits do not count, and interfaces of
the kernel that are known for their faults. What needs a capability is not listed: the process has none.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator
from typing import Final

from service.worker import kernel

_PR_GET_SECCOMP: Final = 21
_PR_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2

# Numbers of system calls: x86-64, aarch64 (asm/unistd_64.h, asm-generic/unistd.h); None: not there.
_DENIED: Final[dict[str, tuple[int | None, int | None]]] = {
    # Communication. A pair of sockets could be connected to others.
    "socket": (41, 198),
    "socketpair": (53, 199),
    # Processes and programs; `clone` makes threads too, see below.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Files: what their owner may do and Landlock does not look at (`truncate`: before ABI 3).
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # Memory that neither the address space nor the scratch directory shows, or that stays after the end.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Interfaces that exploits of the kernel like.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "vmsplice": (278, 75),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
# Nothing happens, and the caller is told that it did: onnxruntime gives each of its threads a core.
_IGNORED: Final = {"sched_setaffinity": (203, 122)}
# Commands of `fcntl` that have the kernel signal another process: F_SETOWN, F_SETSIG, F_SETOWN_EX.
_FCNTL: Final = (72, 25)
_OWNERS: Final = (8, 10, 15)
# Allowed where the first argument is this process: (x86-64, aarch64).
_ABOUT_ONESELF: Final = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
_CLONE: Final = (56, 220)
_CLONE_THREAD: Final = 0x10000
# Its flags lie in memory, which a filter cannot read; without it the C library calls `clone`.
_CLONE3: Final = 435
# The newest system call known to this list; later ones are answered as an older kernel would.
_NEWEST: Final = 469

_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_...

# Classic BPF, linux/bpf_common.h and linux/seccomp.h.
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS, from struct seccomp_data
_IF_EQUAL: Final = 0x15
_IF_GREATER: Final = 0x25
_IF_SET: Final = 0x45
_RETURN: Final = 0x06
# Offsets; of the first two arguments' low halves, on little endian.
_NUMBER, _ARCHITECTURE, _ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_ERROR: Final = 0x00050000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def available() -> bool:
    """Whether this kernel takes filters and the numbers of its system calls are known."""
    if sys.platform != "linux" or os.uname().machine not in _MACHINES or sys.byteorder != "little":
        return False
    try:
        return kernel.prctl(_PR_GET_SECCOMP) >= 0
    except OSError:
        return False


def restrict() -> None:
    """Filter the system calls of this thread and all it starts. Needs no_new_privs.

    Raises:
        OSError: the kernel says no.
    """
    program = list(_program(*_MACHINES[os.uname().machine], os.getpid()))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))  # struct sock_fprog
    kernel.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(header))


def _program(column: int, architecture: int, process: int) -> Iterator[Instruction]:
    """The filter for the process of that id."""
    denied = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    unknown = (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    yield _LOAD, 0, 0, _ARCHITECTURE
    yield _IF_EQUAL, 1, 0, architecture
    yield _RETURN, 0, 0, _KILL  # a 32-bit call
    yield _LOAD, 0, 0, _NUMBER
    yield _IF_GREATER, 0, 1, _NEWEST  # the x32 calls of x86-64 among them
    yield unknown
    yield _IF_EQUAL, 0, 1, _CLONE3
    yield unknown
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            yield _IF_EQUAL, 0, 1, number
            yield denied
    for numbers in _IGNORED.values():
        yield _IF_EQUAL, 0, 1, numbers[column]
        yield _RETURN, 0, 0, _ERROR
    yield _IF_EQUAL, 0, 2 * len(_OWNERS) + 2, _FCNTL[column]
    yield _LOAD, 0, 0, _SECOND_ARGUMENT
    for command in _OWNERS:
        yield _IF_EQUAL, 0, 1, command
        yield denied
    yield _RETURN, 0, 0, _ALLOW
    for numbers in _ABOUT_ONESELF.values():
        yield _IF_EQUAL, 0, 5, numbers[column]
        yield _LOAD, 0, 0, _ARGUMENT
        yield _IF_EQUAL, 2, 0, process
        yield _IF_EQUAL, 1, 0, 0
        yield denied
        yield _RETURN, 0, 0, _ALLOW
    yield _IF_EQUAL, 0, 4, _CLONE[column]
    yield _LOAD, 0, 0, _ARGUMENT
    yield _IF_SET, 1, 0, _CLONE_THREAD
    yield denied
    yield _RETURN, 0, 0, _ALLOW
    yield _RETURN, 0, 0, _ALLOW
