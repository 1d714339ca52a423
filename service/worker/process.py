"""A job's process as the supervisor sees it: started, listened to, killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from service.errors import Cause, ServiceErrorCode
from service.worker.order import ORDER_FILE, Limits, Order, OutcomeReport, ProgressReport, Report, Work

COMMAND = (sys.executable, "-P", "-m", "service.worker")
"""Started with the scratch directory as last argument and as working directory."""

# The process runs native code on hostile input: it gets no secret that the service's environment holds.
_ENVIRONMENT: Final = (
    "PATH",
    "LANG",
    "LC_ALL",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_OUTPUT_FILE: Final = "output.txt"
_OUTPUT_TAIL: Final = 4000
_LONGEST_REPORT: Final = 1 << 16
_PIPE_BYTES: Final = 1 << 20  # as much as a pipe can hold
_LOOK_SECONDS: Final = 0.05
_REPORT: Final[TypeAdapter[Report]] = TypeAdapter(Report)


class JobProcess:
    """The process of one job. Use as a context manager: at the end nothing of it is left running."""

    def __init__(self, job: str, work: Work, limits: Limits, scratch: Path) -> None:
        self.progress: ProgressReport | None = None
        """The latest report of progress."""
        self._outcome: OutcomeReport | None = None
        self._scratch = scratch
        self._buffer = b""
        self._reports, report_descriptor = os.pipe()
        os.set_blocking(self._reports, False)
        self._poll = select.poll()
        self._poll.register(self._reports, select.POLLIN)
        try:
            order = Order(
                job=job,
                work=work,
                limits=limits,
                supervisor_pid=os.getpid(),
                report_descriptor=report_descriptor,
            )
            (scratch / ORDER_FILE).write_text(order.model_dump_json())
            self._process = _start(scratch, report_descriptor)
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(report_descriptor)
        self._started_at = time.monotonic()

    def __enter__(self) -> JobProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        os.close(self._reports)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def elapsed_seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started_at

    def wait(self, seconds: float) -> bool:
        """Listen for up to that long; says whether the process has ended."""
        deadline = time.monotonic() + seconds
        while not self._has_exited():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # The end of the process does not wake this up, so look for it often.
            if self._poll.poll(1000 * min(left, _LOOK_SECONDS)):
                self._listen()
        self.kill()
        if self._poll.poll(0):
            self._listen()
        return True

    def kill(self) -> None:
        """Kill the process and all that it started."""
        if self._process.returncode is None:
            # Not reaped yet, so that its number cannot belong to another group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def failure(self) -> Cause | None:
        """Why the ended process failed; None when it succeeded."""
        if self._outcome is not None:
            return self._outcome.failure
        status = self._process.returncode
        if status == -signal.SIGXCPU:
            return Cause(
                code=ServiceErrorCode.WORKER_TIMEOUT,
                detail="The job took more CPU time than the service allows.",
            )
        if status == -signal.SIGABRT and "bad_alloc" in self.output_tail():
            return Cause(
                code=ServiceErrorCode.WORKER_OUT_OF_MEMORY,
                detail="The job needs more memory than the service allows it.",
            )
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Cause(
            code=ServiceErrorCode.WORKER_CRASHED,
            detail=f"The process of the job ended with {how} before its work was done.",
        )

    def output_tail(self) -> str:
        """The end of what the process printed."""
        with (self._scratch / _OUTPUT_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _OUTPUT_TAIL))
            return file.read().decode(errors="replace")

    def _has_exited(self) -> bool:
        # Without reaping: the process group's number stays ours until it has been killed.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _listen(self) -> None:
        """Take the reports that are there. A hostile process may write anything, and without end."""
        try:
            chunk = os.read(self._reports, _PIPE_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            self._poll.unregister(self._reports)
            return
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if len(self._buffer) > _LONGEST_REPORT:
            self._buffer = b""
        for line in lines:
            with contextlib.suppress(ValidationError):
                report = _REPORT.validate_json(line)
                if isinstance(report, ProgressReport):
                    self.progress = report
                else:
                    self._outcome = report


def _start(scratch: Path, report_descriptor: int) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
    with (scratch / _OUTPUT_FILE).open("wb") as output:
        return subprocess.Popen(
            [*COMMAND, str(scratch)],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[report_descriptor],
            start_new_session=True,
        )
