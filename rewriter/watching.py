"""How `onnx-qat` shows work that takes long, logs a training run, and lets it be stopped."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import rich.console
import rich.progress
import rich.table

from rewriter.errors import ErrorCode, QatError
from rewriter.progress import Progress

if TYPE_CHECKING:  # it needs onnxruntime, which may be missing
    from rewriter.finetune import LogRecord

_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on standard error, one line a stage; nothing where that is not a terminal."""
    with _bar() as (_, report):
        yield report


@contextlib.contextmanager
def training_log(
    file: pathlib.Path | None, *, append: bool
) -> Iterator[tuple[Progress, Callable[[LogRecord], None]]]:
    """Progress and log of a training run.

    On a terminal the newest record of a step stands beside the bar, and evaluations above it; elsewhere every
    record is a line on standard output.

    Args:
        file: gets every record as a line of JSON.
        append: whether it keeps what it has.

    Raises:
        QatError: `output_unwritable`.
    """
    with contextlib.ExitStack() as stack:
        stream = None
        if file is not None:
            try:
                stream = stack.enter_context(file.open("a" if append else "w", encoding="utf-8", buffering=1))
            except OSError as error:
                raise QatError(
                    ErrorCode.OUTPUT_UNWRITABLE,
                    f"The log {file} cannot be written: {error.strerror}.",
                    file=file.name,
                ) from error
        bar, progress = stack.enter_context(_bar())

        def log(record: LogRecord) -> None:
            if stream is not None:
                print(record.to_json(), file=stream)
            if bar.disable or not sys.stdout.isatty():
                print(record, flush=True)
            elif record.event == "evaluation":
                bar.console.print(str(record), markup=False, highlight=False)
            if record.event == "step" and bar.task_ids:
                bar.update(bar.task_ids[-1], figures=f"{record.step}/{record.steps}  {record.figures()}")

        yield progress, log


@contextlib.contextmanager
def _bar() -> Iterator[tuple[rich.progress.Progress, Progress]]:
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description:<14}"),
        rich.progress.BarColumn(),
        # A terminal that is too narrow cuts off what comes last.
        rich.progress.TaskProgressColumn(table_column=rich.table.Column(min_width=4, no_wrap=True)),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[figures]}", markup=False),
    )
    with rich.progress.Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=False
    ) as bar:
        tasks: dict[str, rich.progress.TaskID] = {}

        def report(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0, figures="")
            bar.update(tasks[stage], completed=fraction)

        yield bar, report


class Interruption:
    """Which signal asked to stop, None so far."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """In the block the first SIGINT or SIGTERM is only noted; the next one does what it did before."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # Python takes no signals there
        yield interruption
        return
    former = {number: signal.getsignal(number) for number in _STOPPING}
    # A shell has a job in the background ignore SIGINT: it is meant for another one.
    former = {number: handler for number, handler in former.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def note(number: int, frame: types.FrameType | None) -> None:
        interruption.signal = number
        restore()

    for number in former:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        restore()
