"""Files in the data directory. Whatever has a final name is whole: it got there by a rename after fsync."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataDirectory:
    """Layout of the data directory; all of it is one file system, so that a rename is atomic.

    uploads/KIND/ID/      one directory an upload, its files read-only
    results/JOB/          what a succeeded job made
    staging/              uploads that are being received
    scratch/              working directories of running jobs
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.database = self.root / "onnx-qat.db"
        self.staging = self.root / "staging"
        self.scratch = self.root / "scratch"
        self._uploads = self.root / "uploads"
        self._results = self.root / "results"

    def upload(self, kind: str, identifier: str) -> Path:
        return self._uploads / kind / identifier

    def result(self, job: str) -> Path:
        return self._results / job

    def create(self) -> None:
        """Make the directories, and drop what a service that died left half done."""
        for directory in (self.staging, self.scratch):
            shutil.rmtree(directory, ignore_errors=True)
        for directory in (self.root, self.staging, self.scratch, self._uploads, self._results):
            directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process.

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

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A directory to receive an upload in; what is still in it at the end is removed."""
        directory = Path(tempfile.mkdtemp(dir=self.staging))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, target: Path) -> bool:
    """Give a finished directory its final name; false when there is one of that name already."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    _sync(target.parent)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
