"""What a job's process gives up before it looks at its input, as far as this kernel can.

It keeps its scratch directory, the files of its own job, and what Python and its libraries read. Capabilities
go, Landlock closes the rest of the file system, a system call filter closes the network and other processes.
None of it needs privileges.

A thread keeps what it had when it was started, and numeric libraries start threads when they are imported:
therefore only the standard library is loaded before `enter`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from service.worker import kernel, landlock, seccomp
from service.worker.limits import Limits, apply_limits, die_with

ORDER_FILE: Final = "order.json"
"""Name of the order in the scratch directory."""

_PR_SET_NO_NEW_PRIVS: Final = 38
_SYS_CAPGET_CAPSET: Final = {"x86_64": (125, 126), "aarch64": (90, 91)}
_CAPABILITY_VERSION: Final = 0x20080522
# A service that runs as root may need it to reach a data directory of another owner.
_CAP_DAC_OVERRIDE: Final = 1 << 1

# What the C library, OpenSSL and onnxruntime read, beside the libraries themselves.
_SYSTEM: Final = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
)
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_PACKAGES: Final = ("rewriter", "service")


def enter(scratch: Path) -> None:
    """Become the process of the job that is ordered in the scratch directory.

    Raises:
        OSError: the kernel has a protection and refuses it.
        RuntimeError: there are threads already.
    """
    order = json.loads((scratch / ORDER_FILE).read_bytes())
    die_with(order["supervisor_pid"])
    apply_limits(Limits(**order["limits"]))
    confine(scratch, [Path(path) for path in order["inputs"]], Path(order["private"]))


def confine(scratch: Path, inputs: Sequence[Path], private: Path) -> None:
    """Give up everything else, for good. Nothing happens where the kernel has nothing to offer.

    Args:
        scratch: may be written.
        inputs: files and directories that may be read.
        private: the service's data, not to be read even where it lies below a directory that may be.

    Raises:
        OSError: the kernel has a protection and refuses it.
        RuntimeError: there are threads already.
    """
    if sys.platform != "linux":
        return
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("A thread was started before the process was confined.")
    # First: it takes files that the next step closes.
    access = _access(scratch, inputs, private)
    kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    if landlock.version() >= 1:
        landlock.restrict(access)
    if seccomp.available():
        seccomp.restrict()


def _access(scratch: Path, inputs: Sequence[Path], private: Path) -> landlock.Access:
    read: list[Path] = []
    list_: list[Path] = []
    for root in _roots():
        if private.is_relative_to(root):
            read.extend(_around(root, private))
            list_.append(root)  # Python looks for modules in it
        else:
            read.append(root)
    return landlock.Access(
        read=[*read, *inputs], list=list_, write=[scratch, *(Path(device) for device in _DEVICES)]
    )


def _roots() -> Iterator[Path]:
    """Directories and files that the process reads whatever the job is, links resolved."""
    python = [sys.prefix, sys.base_prefix, *sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    for name in _PACKAGES:  # of an editable installation
        specification = importlib.util.find_spec(name)
        if specification is not None:
            python.extend(specification.submodule_search_locations or [])
    yield from {Path(path).resolve(): None for path in (*_SYSTEM, *python) if path}


def _around(root: Path, private: Path) -> Iterator[Path]:
    """What lies beneath `root`, but for `private`, its ancestors and hidden files."""
    if root == private:
        return
    for path in root.iterdir():
        if private.is_relative_to(path):
            yield from _around(path, private)
        elif not path.name.startswith("."):
            yield path


def _drop_capabilities() -> None:
    """Root is the owner of its files then, and nothing more; others have no capabilities anyway."""
    numbers = _SYS_CAPGET_CAPSET.get(os.uname().machine)
    if numbers is None:
        return
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    sets = ctypes.create_string_buffer(24)
    kernel.syscall(numbers[0], header, sets)
    permitted = struct.unpack("=6I", sets.raw)[1] & _CAP_DAC_OVERRIDE
    kernel.syscall(numbers[1], header, struct.pack("=6I", permitted, permitted, 0, 0, 0, 0))
