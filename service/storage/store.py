"""The store: uploads and results as whole files under keys, never changed once they are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from service.settings import Settings
from service.storage.directory import DataDirectory


class StoreUnavailableError(Exception):
    """The store does not answer, or refuses; the same call may succeed later."""


class Store(Protocol):
    """Files under keys such as `blobs/ab/abcdef...` (`blob_key`) and `results/JOB/1/bundle.zip`.

    Safe to use from several threads and processes. Every method raises `StoreUnavailableError`.
    """

    def put(self, key: str, file: Path) -> None:
        """Keep a file, which nobody changes from now on; it is there whole or not at all.

        A file under this key stays as it is: the same key always has the same content.
        """

    def exists(self, key: str) -> bool: ...

    def fetch(self, key: str, target: Path, sha256: str) -> None:
        """Make a file available, for reading only, under a local path that does not exist yet.

        Raises:
            FileNotFoundError: there is none.
            OSError: the store has something else under the key than was stored.
        """

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, which is not included; FileNotFoundError at once."""

    def link(self, key: str) -> str | None:
        """An address at which a client may get the file itself for some minutes, if there is such a thing."""

    def delete(self, key: str) -> None:
        """Remove a file; nothing happens when there is none."""

    def delete_all(self, prefix: str) -> None:
        """Remove all files whose keys begin with a prefix that ends in a slash."""

    def check(self) -> None:
        """Raise when nothing can be stored."""


def blob_key(sha256: str) -> str:
    """Key of uploaded content: the same for whatever it was uploaded as."""
    return f"blobs/{sha256[:2]}/{sha256}"


def result_key(job: str, attempt: int, name: str = "") -> str:
    """Key of a file that an attempt at a job made; without a name the prefix of them all."""
    return f"results/{job}/{attempt}/{name}"


def results_key(job: str) -> str:
    """Prefix of the files of all attempts at a job."""
    return f"results/{job}/"


def open_store(settings: Settings, data: DataDirectory) -> Store:
    """The store of the settings."""
    if settings.store_url is None:
        from service.storage.local import LocalStore

        return LocalStore(data.root)
    from service.storage.s3 import S3Store

    return S3Store(settings)
