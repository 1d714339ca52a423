"""What requests that bring content at the same time share: memory for blocks, threads that write them."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import fcntl
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from service.errors import ServiceError, ServiceErrorCode
from service.settings import Settings
from service.storage import room
from service.storage.directory import DataDirectory

if TYPE_CHECKING:
    from hashlib import _Hash

# Blocks of all requests together, and the limits of one. A request fills a block while its last is written.
_BUDGET: Final = 32 << 20
_LARGEST_BLOCK: Final = 1 << 20
_SMALLEST_BLOCK: Final = 64 << 10
# In one call. For more, Linux 6.18 looks for large pages (folios of ext4) and spends several times as long on
# that as on the writing: 4 GiB by 1 MiB took 6 seconds of CPU time, by 64 KiB 1.3.
_WRITE: Final = 64 << 10
# From here on a file is written past the page cache: so large a one is not read at once, and finding memory
# for its pages can cost more than all else. In a virtual machine 4 GiB took 10 to 20 seconds with it, and 8
# without.
_DIRECT_FROM: Final = 64 << 20
_DIRECT_UNIT: Final = 4 << 10  # of disks, file systems and memory
# More would only wait for the same disk. What may take long (a large file into a bucket) has threads apart,
# and requests for anything else have anyio's.
_WRITERS: Final = 4
_STORERS: Final = 4
_RETRY_SECONDS: Final = 5

P = ParamSpec("P")
T = TypeVar("T")


class Intake:
    """Admits requests that bring content, as many as the settings allow."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Final = settings
        self.turn: Final = asyncio.Lock()
        """Held for a round of the event loop by each body in turn that asks for more. Otherwise a round
        takes as long as there are bodies, and so does whatever else the service is asked."""
        self._active = 0
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="upload")
        self._storers = ThreadPoolExecutor(_STORERS, thread_name_prefix="store")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count one request while its content is received.

        Raises:
            ServiceError: `uploads_busy`.
        """
        if self._active >= self.settings.max_uploads_at_once:
            raise ServiceError(
                ServiceErrorCode.UPLOADS_BUSY,
                f"The service receives {self._active} uploads already, as many as it may; try again.",
                headers={"Retry-After": str(_RETRY_SECONDS), "Connection": "close"},
            )
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    @property
    def is_shared(self) -> bool:
        """Whether more than one request is bringing content."""
        return self._active > 1

    @property
    def block(self) -> int:
        """Bytes that one request may collect now: its share of the memory, which shrinks as more come."""
        return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, _BUDGET // (2 * max(self._active, 1))))

    @asynccontextmanager
    async def staged(self, data: DataDirectory) -> AsyncIterator[Path]:
        """`DataDirectory.staged`, whose work (removing a large file takes a while) is done in a thread."""
        staged = data.staged()
        directory = await self.start(staged.__enter__)
        try:
            yield directory
        finally:
            # Also when the request is cancelled.
            await asyncio.shield(self.start(staged.__exit__, None, None, None))

    def start(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Call something that may take long in a thread, in the request's context."""
        return _start(self._storers, call, *args, **kwargs)

    def write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """The same for a block of content, which does not wait for what takes long."""
        return _start(self._writers, call, *args, **kwargs)

    def close(self) -> None:
        self._writers.shutdown()
        self._storers.shutdown()


def _start(
    threads: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> asyncio.Future[T]:
    run = contextvars.copy_context().run
    return asyncio.get_running_loop().run_in_executor(threads, lambda: run(call, *args, **kwargs))


class FileWriter:
    """Appends what arrives to a file and hashes it, in a thread, while the next block arrives."""

    def __init__(self, intake: Intake, file: IO[Any], *digests: _Hash) -> None:
        """
        Args:
            file: unbuffered; `close` closes it.
            digests: updated with all that is written.
        """
        self._intake = intake
        self._file = file
        self._digests = digests
        # Made once: blocks that are allocated anew each time cost more than copying into these.
        self._filling = _buffer(intake.block)
        self._resting = _buffer(intake.block)
        self._filled = 0
        self._writing: asyncio.Future[None] | None = None

    async def write(self, piece: bytes) -> None:
        """Raises: OSError: this block, or the one before, could not be written."""
        left = memoryview(piece)
        while left:
            size = min(len(left), len(self._filling) - self._filled)
            self._filling[self._filled : self._filled + size] = left[:size]
            self._filled += size
            left = left[size:]
            if self._filled == len(self._filling):
                await self._hand_over()

    async def flush(self) -> None:
        """Return when all is written (and hashed), though not yet on disk. Raises: OSError."""
        await self._hand_over()
        await self._written()

    def close(self) -> None:
        """Close the file, after the block that is being written, if any; what is not written is dropped."""
        if self._writing is None:
            self._file.close()
        elif self._writing.done():
            self._close_after(self._writing)
        else:
            self._writing.add_done_callback(self._close_after)

    def _close_after(self, writing: asyncio.Future[None]) -> None:
        self._file.close()
        if not writing.cancelled():
            writing.exception()  # nobody waits for it any more

    async def _hand_over(self) -> None:
        await self._written()
        block, self._filled = self._filling[: self._filled], 0
        self._filling, self._resting = self._resting, self._filling
        share = self._intake.block
        if not share // 2 <= len(self._filling) <= share * 2:
            self._filling = _buffer(share)
        if block:
            reserved = self._intake.settings.reserved_bytes
            self._writing = self._intake.write(_append, self._file, block, self._digests, reserved)

    async def _written(self) -> None:
        if self._writing is not None:
            # A request that is cancelled does not cancel the writing, which has the file.
            await asyncio.shield(self._writing)
            self._writing = None


def _buffer(size: int) -> memoryview:
    # One that `_write_directly` writes must begin with a page.
    return memoryview(mmap.mmap(-1, size) if size == _LARGEST_BLOCK else bytearray(size))


def _append(file: IO[Any], block: memoryview, digests: tuple[_Hash, ...], reserved: int) -> None:
    room.require(file.fileno(), reserved, len(block))
    # Written first: a digest is never ahead of its file.
    left = _write_directly(file, block)
    while left:
        left = left[file.write(left[:_WRITE]) :]
    for digest in digests:
        digest.update(block)


def _write_directly(file: IO[Any], block: memoryview) -> memoryview:
    """Write a block of a large file past the page cache, where the file system can; what is left of it."""
    position = file.tell()
    if len(block) < _LARGEST_BLOCK or position < _DIRECT_FROM or position % _DIRECT_UNIT:
        return block
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    try:  # Linux refuses the flag, or the write
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags | os.O_DIRECT)
        return block[file.write(block) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return block
    finally:
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags)
