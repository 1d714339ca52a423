"""The store as a directory. Whatever has a final name is whole: it was linked there after fsync."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from service.storage.store import StoreUnavailableError, blob_key

_CHUNK: Final = 1 << 18
# How often a file is put whose directory somebody else removes as empty in between (`delete_all`).
_PUT_ATTEMPTS: Final = 5
# No hard link here (another file system, a limit of it): copy.
_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


class LocalStore:
    """A `Store` in a directory; files come in and go out by hard links, without copying their bytes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, file: Path) -> None:
        target = self._root / key
        file.chmod(0o444)
        _sync(file)
        for _ in range(_PUT_ATTEMPTS - 1):
            try:
                self._place(file, target)
                return
            except FileNotFoundError:
                continue
        self._place(file, target)

    def exists(self, key: str) -> bool:
        return (self._root / key).is_file()

    def fetch(self, key: str, target: Path, sha256: str) -> None:
        _link_or_copy(self._root / key, target)

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        file = (self._root / key).open("rb")
        file.seek(start)

        def chunks(left: int) -> Iterator[bytes]:
            with file:
                while left and (chunk := file.read(min(left, _CHUNK))):
                    left -= len(chunk)
                    yield chunk

        return chunks(end - start)

    def link(self, key: str) -> str | None:
        return None

    def delete(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root / prefix)
        # The directory of a job goes with its last attempt; what everything is in stays.
        parent = Path(prefix).parent
        if len(parent.parts) > 1:
            with contextlib.suppress(OSError):
                (self._root / parent).rmdir()

    def check(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise StoreUnavailableError("The data directory cannot be written.")

    def adopt_version_0_1_0(self) -> None:
        """Take over uploads/KIND/ID/NAME and results/JOB/ as version 0.1.0 kept them. May be interrupted."""
        uploads = self._root / "uploads"
        for file in uploads.glob("*/*/*"):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            self.put(blob_key(digest), file)
        shutil.rmtree(uploads, ignore_errors=True)
        for files in self._root.glob("results/*/files"):
            attempt = files.parent / "1"
            attempt.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (files.parent / "bundle.zip").rename(attempt / "bundle.zip")
            files.rename(attempt / "files")

    def _place(self, file: Path, target: Path) -> None:
        self._make_directory(target.parent)
        with contextlib.suppress(FileExistsError):
            _link_or_copy(file, target)
        _sync(target.parent)

    def _make_directory(self, directory: Path) -> None:
        """Make it and its parents, so that they are still there after a loss of power."""
        missing = [path for path in (directory, *directory.parents) if not path.is_dir()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync(path.parent)


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(file, unfinished)
            unfinished.chmod(0o444)
            _sync(unfinished)
            unfinished.rename(target)
        finally:
            unfinished.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
