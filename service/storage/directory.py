"""The data directory of one machine: what is being received, and where jobs work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataDirectory:
    """Layout of the data directory; all of it is one file system, so that files move by a link.

    onnx-qat.db           the database, unless it is PostgreSQL
    blobs/, results/      the store, unless it is S3 (service/storage/local.py)
    staging/              uploads that are being received
    partial/              what has arrived of resumable uploads (service/resumable)
    inputs/               what running jobs read
    scratch/              working directories of running jobs

    Several processes may share it. What is in staging, inputs and scratch belongs to the process that made
    it, and is removed by the next process that starts after that one has died.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.database_url = f"sqlite:///{self.root / 'onnx-qat.db'}"
        self.staging = self.root / "staging"
        self.partial = self.root / "partial"
        self.inputs = self.root / "inputs"
        self.scratch = self.root / "scratch"

    def create(self) -> None:
        """Make the directories, and drop what a process that died left half done."""
        for directory in (self.root, self.staging, self.partial, self.inputs, self.scratch):
            directory.mkdir(parents=True, exist_ok=True)
        self.remove_abandoned()

    def remove_abandoned(self) -> None:
        """Drop what processes that died left half done; what belongs to a living one stays."""
        for directory in (self.staging, self.inputs, self.scratch):
            for left in directory.iterdir():
                _remove_unless_held(left)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the whole directory for this process.

        Raises:
            BlockingIOError: another service uses it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    error.errno, "Another service uses this data directory", str(self.root)
                ) from error
            yield

    def staged(self) -> contextlib.AbstractContextManager[Path]:
        """A directory to receive an upload in; what is still in it at the end is removed."""
        return _held(self.staging)

    @contextmanager
    def workplace(self, job: str) -> Iterator[tuple[Path, Path]]:
        """A directory for a job's inputs, which its process only reads, and one for it to work in."""
        with _held(self.inputs, f"{job}-") as inputs, _held(self.scratch, f"{job}-") as scratch:
            yield inputs, scratch


@contextmanager
def _held(parent: Path, prefix: str = "") -> Iterator[Path]:
    """A new directory that other processes leave alone as long as this one lives."""
    directory, descriptor = _make_held(parent, prefix)
    try:
        yield directory
    finally:
        _remove_quietly(directory)
        os.close(descriptor)


def _make_held(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # A process that starts just now may take the directory for abandoned, before the lock.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(descriptor), directory.stat()):
                    return directory, descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _remove_unless_held(directory: Path) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone already, or nothing that this module made
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_quietly(directory)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _remove_quietly(directory: Path) -> None:
    with contextlib.suppress(OSError):  # the next start tries again
        remove(directory)


def remove(directory: Path) -> None:
    """Remove what a hostile process may have left, however deep it is and whatever its modes are.

    Raises:
        OSError: something cannot be removed.
    """
    # Directories are brought up one by one, so that neither a path nor a recursion grows with the depth.
    while paths := list(directory.iterdir()):
        for path in paths:
            if not _is_directory(path):
                path.unlink()
                continue
            path.chmod(0o700)
            for inner in path.iterdir():
                if _is_directory(inner):
                    inner.chmod(0o700)  # one that cannot be written cannot be moved either
                    inner.rename(directory / uuid.uuid4().hex)
                else:
                    inner.unlink()
            path.rmdir()
    directory.rmdir()


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)
