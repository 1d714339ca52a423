"""From what jobs are kept on this machine: found out by a process that confines itself and tries."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from service.worker import kernel, landlock
from service.worker.confinement import confine

log = structlog.get_logger()

_COMMAND: Final = (sys.executable, "-P", "-m", "service.worker.isolation")
_PROBE_SECONDS: Final = 60
_PR_SET_DUMPABLE: Final = 4


@dataclasses.dataclass(frozen=True)
class Isolation:
    """The protections; true where they are active."""

    writes: bool = False
    reads: bool = False
    network: bool = False
    processes: bool = False

    @property
    def missing(self) -> list[str]:
        """What is not kept from jobs, as sentences."""
        return [sentence for name, sentence in _WITHOUT.items() if not getattr(self, name)]


_WITHOUT: Final = {
    "writes": "A job can write outside its own directory.",
    "reads": "A job can read files of other jobs, the database and the memory of the service.",
    "network": "A job can reach the network or local sockets.",
    "processes": "A job can start or signal other processes.",
}


class IsolationUnavailableError(RuntimeError):
    """Jobs cannot be isolated as the settings demand."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(
            "ONNX_QAT_JOB_ISOLATION is `required`, and this machine cannot isolate jobs in full: "
            + " ".join(missing)
        )


def examine(*, required: bool) -> Isolation:
    """What `probe` finds; what is missing goes into the log.

    Raises:
        IsolationUnavailableError: something is missing and all is required.
    """
    _shield()
    found = probe()
    log.info("isolation of jobs", **dataclasses.asdict(found))
    for sentence in found.missing:
        log.warning("isolation of jobs is incomplete on this machine", detail=sentence)
    if found.missing and required:
        raise IsolationUnavailableError(found.missing)
    return found


def probe() -> Isolation:
    """Which protections are active on this machine; none if the probe itself fails."""
    with tempfile.TemporaryDirectory(prefix="onnx-qat-") as folder:
        try:
            answer = subprocess.run(
                [*_COMMAND, folder], stdout=subprocess.PIPE, timeout=_PROBE_SECONDS, check=True
            ).stdout
            return Isolation(**json.loads(answer))
        except (subprocess.SubprocessError, ValueError, TypeError):
            return Isolation()


def _shield() -> None:
    """Where Landlock is missing, have /proc not show the memory of this process to others of its user.

    Nor to itself: metrics of this process then lack what they take from there, so that this is the fallback.
    """
    if sys.platform == "linux" and landlock.version() < 1:
        kernel.prctl(_PR_SET_DUMPABLE, 0)


def _try_all(folder: Path) -> Isolation:
    """Be a confined process, and report what was denied."""
    scratch, outside, parent = folder / "scratch", folder / "outside", os.getppid()
    scratch.mkdir()
    outside.write_text("of another job")
    confine(scratch, [], folder)
    (scratch / "file").write_text("this must be possible")
    return Isolation(
        writes=_denied(lambda: outside.open("r+"))
        and _denied((folder / "new").touch)
        and _denied(lambda: os.truncate(outside, 0)),
        reads=_denied(outside.read_bytes) and _denied(Path(f"/proc/{parent}/environ").read_bytes),
        network=_denied(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        and _denied(lambda: socket.socket(socket.AF_UNIX)),
        processes=_denied(_fork) and _denied(lambda: os.kill(parent, 0)),
    )


def _denied(act: Callable[[], object]) -> bool:
    try:
        act()
    except PermissionError:
        return True
    return False


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
    os.wait()


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_try_all(Path(sys.argv[1]).resolve()))))
