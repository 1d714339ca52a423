"""The process of one job does the work and reports. What it parses and runs is hostile: it is confined."""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rewriter import Progress, QatError, finalize, prepare, write_zip
from service.errors import Cause, ServiceErrorCode
from service.storage import room
from service.worker.confinement import ORDER_FILE
from service.worker.order import (
    BUNDLE_FILE,
    RESULT_DIRECTORY,
    FinalizeWork,
    Order,
    OutcomeReport,
    PrepareWork,
    ProgressReport,
)
from service.worker.postmortem import FILE_TOO_LARGE, OUT_OF_MEMORY, is_about_memory

INT8_MODEL_FILE: Final = "model.int8.onnx"
FINALIZE_REPORT_FILE: Final = "finalize.json"
_PROGRESS_SECONDS: Final = 0.1


def run_prepare(work: PrepareWork, result: Path, progress: Progress) -> None:
    """Write the bundle as files and as a zip."""
    files = result / "files"
    prepare(work.model, files, recipe=work.recipe, calibration=work.calibration, progress=progress)
    write_zip(files, result / BUNDLE_FILE)


def run_finalize(work: FinalizeWork, result: Path, progress: Progress) -> None:
    """Write the int8 model and the report on it."""
    files = result / "files"
    files.mkdir()
    report = finalize(
        work.bundle,
        files / INT8_MODEL_FILE,
        checkpoint=work.checkpoint,
        verify=work.verify,
        progress=progress,
    )
    (files / FINALIZE_REPORT_FILE).write_text(report.model_dump_json(indent=2))


WORK: Final[dict[str, Callable[..., None]]] = {
    "prepare": run_prepare,
    "finalize": run_finalize,
}


def main(scratch: Path) -> int:
    """Carry out the order in a scratch directory; the exit status says whether an outcome was reported."""
    order = Order.model_validate_json((scratch / ORDER_FILE).read_bytes())
    reporter = _Reporter(order.report_descriptor)
    reporter.finish(_attempt(order, scratch / RESULT_DIRECTORY, reporter.progress))
    return 0


def _attempt(order: Order, result: Path, progress: Progress) -> Cause | None:
    """Do the work; the failure, if any."""
    try:
        result.mkdir()
        WORK[order.work.kind](order.work, result, progress)
    except Exception as error:
        return _cause_of(error)
    return None


def _cause_of(error: Exception) -> Cause:
    """What the service ran out of, else what the library says."""
    reason: BaseException | None = error
    while reason is not None:
        if (exhausted := _exhausted(reason)) is not None:
            return exhausted
        reason = reason.__cause__
    if isinstance(error, QatError):
        return Cause.of(error)
    traceback.print_exception(error)
    return Cause(code=ServiceErrorCode.INTERNAL_ERROR, detail="The job failed; the service's log says why.")


def _exhausted(error: BaseException) -> Cause | None:
    if isinstance(error, MemoryError) or is_about_memory(str(error)):
        return Cause(code=ServiceErrorCode.WORKER_OUT_OF_MEMORY, detail=OUT_OF_MEMORY)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return Cause(
            code=ServiceErrorCode.WORKER_OUTPUT_TOO_LARGE,
            detail=FILE_TOO_LARGE,
        )
    if room.is_full(error):
        return Cause(code=ServiceErrorCode.STORAGE_FULL, detail="The service is out of disk space.")
    return None


class _Reporter:
    """Writes reports for the supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stage: str | None = None
        self._reported_at = 0.0

    def progress(self, stage: str, fraction: float) -> None:
        """Report progress, not more often than a person could see it."""
        now = time.monotonic()
        if stage == self._stage and now - self._reported_at < _PROGRESS_SECONDS:
            return
        self._stage, self._reported_at = stage, now
        self._write(ProgressReport(stage=stage[:100], fraction=min(max(fraction, 0.0), 1.0)))

    def finish(self, failure: Cause | None) -> None:
        self._write(OutcomeReport(failure=failure))

    def _write(self, report: ProgressReport | OutcomeReport) -> None:
        line = report.model_dump_json().encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
