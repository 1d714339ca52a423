"""A job's process as the supervisor sees it: started, listened to, killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from pydantic import TypeAdapter, ValidationError

from service.errors import Cause
from service.worker.confinement import ORDER_FILE
from service.worker.limits import Limits
from service.worker.order import Order, OutcomeReport, ProgressReport, Report, Work
from service.worker.postmortem import cause_of_death
from service.worker.usage import excess

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
_MUCH_OF_THE_MEMORY: Final = 0.8  # the limit is on addresses, and not all of them are in use
_REPORT: Final[TypeAdapter[Report]] = TypeAdapter(Report)


class JobProcess:
    """The process of one job. Use as a context manager: at the end nothing of it is left running."""

    def __init__(
        self,
        job: str,
        work: Work,
        limits: Limits,
        scratch: Path,
        private: Path,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """Start it.

        Args:
            limits: what it may use.
            scratch: an empty directory that it may write.
            private: the service's data, which it may not read.
            on_stage: called with the stage of every report of progress.
        """
        self._on_stage = on_stage
        self.progress: ProgressReport | None = None
        """The latest report of progress."""
        self.cpu_seconds = 0.0
        """CPU time that it took, known at the end."""
        self.peak_memory_bytes = 0
        """Largest resident memory, known at the end."""
        self._outcome: OutcomeReport | None = None
        self._limits = limits
        self._scratch = scratch
        self._oom_kills = _oom_kills()
        self._buffer = b""
        self._output = (scratch / _OUTPUT_FILE).open("w+b")
        self._reports, report_descriptor = os.pipe()
        os.set_blocking(self._reports, False)
        self._poll = select.poll()
        self._poll.register(self._reports, select.POLLIN)
        try:
            order = Order(
                job=job,
                work=work,
                limits=limits,
                inputs=work.inputs,
                private=private,
                supervisor_pid=os.getpid(),
                report_descriptor=report_descriptor,
            )
            (scratch / ORDER_FILE).write_text(order.model_dump_json())
            self._process = _start(scratch, report_descriptor, self._output)
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
        self._output.close()

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
            _, status, used = os.wait4(self._process.pid, 0)
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = used.ru_utime + used.ru_stime
            self.peak_memory_bytes = used.ru_maxrss * 1024

    def failure(self) -> Cause | None:
        """Why the ended process failed; None when it succeeded."""
        if self._outcome is not None:
            return self._outcome.failure
        return cause_of_death(
            self._process.returncode,
            None if self.progress is None else self.progress.stage,
            self.output_tail(),
            no_memory=_oom_kills() > self._oom_kills or self._was_at_its_memory_limit(),
            no_cpu=self._limits.cpu_seconds is not None and self.cpu_seconds >= self._limits.cpu_seconds,
        )

    def excess(self) -> Cause | None:
        """The limit that the process is beyond, of those that the kernel does not enforce."""
        running = self._process.returncode is None
        return excess(self._limits, self.pid if running else None, self._scratch)

    def output_tail(self) -> str:
        """The end of what the process printed."""
        # By the descriptor, whose file the process cannot exchange; at a position, which it shares.
        descriptor = self._output.fileno()
        start = max(0, os.fstat(descriptor).st_size - _OUTPUT_TAIL)
        return os.pread(descriptor, _OUTPUT_TAIL, start).decode(errors="replace")

    def _was_at_its_memory_limit(self) -> bool:
        """Whether native code may have crashed because it got no memory and did not look."""
        allowed = self._limits.memory_bytes
        return allowed is not None and self.peak_memory_bytes > _MUCH_OF_THE_MEMORY * allowed

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
                    self._on_stage(report.stage)
                else:
                    self._outcome = report


def _start(scratch: Path, report_descriptor: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
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


def _oom_kills() -> int:
    """How many processes the system has killed for want of memory so far; 0 where it does not say."""
    try:
        counters = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return int(counters.partition("\noom_kill ")[2].split("\n", 1)[0] or 0)
