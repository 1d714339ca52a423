"""Files on their way from the service: under a temporary name until they are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from rewriter import ErrorCode, QatError
from service.client.connection import Connection
from service.client.errors import DownloadError, UnreachableError
from service.uploads.schemas import StoredFile

Count = Callable[[int], None]
"""Called with how many bytes of a file are there."""


def download(connection: Connection, path: str, file: StoredFile, target: Path, count: Count) -> None:
    """Get a file, going on where an earlier attempt broke off, be it another process's.

    Raises:
        ApiError, UnreachableError: the service refuses or does not answer.
        DownloadError: what arrived has not the SHA-256 that the service named.
        OSError: the file cannot be written.
    """
    # The digest in the name: another content never goes on from what is there of this one.
    part = target.with_name(f".{target.name}.{file.sha256[:12]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    found = part.stat().st_size
    _complete(connection, path, file, part, count)
    if found and not _is_whole(part, file):
        part.write_bytes(b"")  # what was found was not the beginning of the file
        _complete(connection, path, file, part, count)
    if not _is_whole(part, file):
        part.unlink()
        raise DownloadError(f"{file.name} did not arrive as it is stored, its SHA-256 differs: try again.")
    part.replace(target)


def _complete(connection: Connection, path: str, file: StoredFile, part: Path, count: Count) -> None:
    """Get what is missing; as long as each attempt brings something, there is another one."""
    while True:
        have = part.stat().st_size
        try:
            connection.persist(lambda: _append(connection, path, file, part, count))
            return
        except UnreachableError:
            if part.stat().st_size <= have:
                raise


def _append(connection: Connection, path: str, file: StoredFile, part: Path, count: Count) -> None:
    have = part.stat().st_size
    if have >= file.bytes:
        return
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with connection.stream(path, headers=headers) as answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with part.open("ab" if goes_on else "wb") as stream:
            count(stream.tell())
            for chunk in answer.iter_raw():
                stream.write(chunk)
                count(stream.tell())


def _is_whole(part: Path, file: StoredFile) -> bool:
    with part.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256


def require_free(target: Path) -> None:
    """Raise `output_exists` when something is there already, other than an empty directory."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise QatError(
            ErrorCode.OUTPUT_EXISTS, f"{target} exists: name another place for it.", file=target.name
        )


def require_plain(name: str) -> None:
    """Raise when a file of that name would lie outside the directory that it is put in."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise DownloadError(f"The service names a file {name!r}, which is no plain file name.")
