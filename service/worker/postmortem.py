"""Why a job's process ended before it said how its work went."""

from __future__ import annotations

import signal
from typing import Final

from service.errors import Cause, ServiceErrorCode

OUT_OF_MEMORY: Final = (
    "The job needs more memory than the service allows it. "
    "Use a smaller model, or smaller calibration samples."
)
OUT_OF_CPU_TIME: Final = "The job took more CPU time than the service allows. Use fewer calibration samples."
FILE_TOO_LARGE: Final = "The job wrote a file larger than the service allows."

# What native code says when it gets no memory: C++, Python, the C library, OpenBLAS, protobuf.
_MEMORY_WORDS: Final = (
    "bad_alloc",
    "MemoryError",
    "Cannot allocate memory",
    "Memory allocation still failed",
    "Arena alloc failed",
)

_OTHER_INPUT: Final = "See whether onnxruntime runs the model on these samples, or try other samples."
_SIGNALS: Final[dict[int, tuple[ServiceErrorCode, str]]] = {
    signal.SIGSEGV: (
        ServiceErrorCode.WORKER_CRASHED,
        f"native code used memory that it does not have. {_OTHER_INPUT}",
    ),
    signal.SIGBUS: (
        ServiceErrorCode.WORKER_CRASHED,
        "native code used a mapped file beyond its end, or the disk is full. Try again; "
        "if it happens again, upload the model again.",
    ),
    signal.SIGFPE: (
        ServiceErrorCode.WORKER_CRASHED,
        "native code divided an integer by zero. That happens with samples of a size that the model is not "
        "made for: use the height and width that it was trained with.",
    ),
    signal.SIGILL: (
        ServiceErrorCode.WORKER_CRASHED,
        "native code used an instruction that this CPU does not have. Tell the operator of the service.",
    ),
    signal.SIGABRT: (ServiceErrorCode.WORKER_CRASHED, f"native code gave up. {_OTHER_INPUT}"),
    signal.SIGSYS: (ServiceErrorCode.WORKER_CRASHED, "native code made a system call that no job needs."),
    signal.SIGKILL: (
        ServiceErrorCode.WORKER_CRASHED,
        "somebody killed it, possibly the system for want of memory. Try again; tell the operator if it "
        "happens again.",
    ),
    signal.SIGXCPU: (ServiceErrorCode.WORKER_TIMEOUT, OUT_OF_CPU_TIME),
    signal.SIGXFSZ: (ServiceErrorCode.WORKER_OUTPUT_TOO_LARGE, FILE_TOO_LARGE),
}
_OF_NO_MEMORY: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
_OTHERWISE: Final = (
    ServiceErrorCode.WORKER_CRASHED,
    "it said nothing else. Try again; tell the operator if it happens again.",
)


def is_about_memory(text: str) -> bool:
    """Whether a message or an output says that there was no memory to be had."""
    return any(words in text for words in _MEMORY_WORDS)


def cause_of_death(status: int, stage: str | None, output: str, *, no_memory: bool, no_cpu: bool) -> Cause:
    """What the failure of the job is.

    Args:
        status: exit status, or minus the signal.
        stage: what the job was at.
        output: the end of what the process printed.
        no_memory: the system killed a process for want of memory meanwhile, or this one had no more to get.
        no_cpu: the process used up its CPU time.
    """
    how = f"with {_name(-status)}" if status < 0 else f"with exit status {status}"
    where = f"in stage {stage!r}" if stage else "before its first stage"
    code, reason = _SIGNALS.get(-status, _OTHERWISE)
    if status == -signal.SIGKILL and no_cpu:
        code, reason = ServiceErrorCode.WORKER_TIMEOUT, OUT_OF_CPU_TIME
    elif (-status in _OF_NO_MEMORY and no_memory) or (status and is_about_memory(output)):
        code, reason = ServiceErrorCode.WORKER_OUT_OF_MEMORY, OUT_OF_MEMORY
    return Cause(code=code, detail=f"The process of the job ended {how} {where}: {reason}")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
