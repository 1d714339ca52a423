"""The store in a bucket of Amazon S3 or of something that speaks its protocol."""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import obstore
import obstore.store
from obstore.exceptions import BaseError

from service.settings import Settings
from service.storage.store import StoreUnavailableError

# Large files travel in parts; so much of them is in memory at a time.
_PART: Final = 16 << 20
_PARTS: Final = 4
_CHUNK: Final = 1 << 20
# A file may take long, but not without a byte.
_SILENCE: Final = datetime.timedelta(seconds=20)
_REGION: Final = "us-east-1"  # where nothing names one
_LONGEST_REQUEST: Final = datetime.timedelta(hours=6)
# The code in S3's answer; HEAD alone is answered without one.
_NO_BUCKET: Final = "<Code>NoSuchBucket</Code>"
_RETRY: Final[obstore.store.RetryConfig] = {"max_retries": 5, "retry_timeout": datetime.timedelta(seconds=30)}


class S3Store:
    """A `Store` in a bucket. An object appears when all of it has arrived: S3 sees to that.

    The keys come from where AWS's own tools take them: the environment (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY), web identity, container or instance metadata.
    """

    def __init__(self, settings: Settings) -> None:
        self._bucket = _bucket(settings, settings.store_endpoint)
        # A signature holds for one address: the one that the client uses.
        self._public_bucket = _bucket(settings, settings.store_public_endpoint or settings.store_endpoint)
        self._link_lifetime = (
            datetime.timedelta(seconds=settings.presigned_seconds) if settings.presigned_downloads else None
        )

    def put(self, key: str, file: Path) -> None:
        with _failures():
            obstore.put(self._bucket, key, file, chunk_size=_PART, max_concurrency=_PARTS)

    def exists(self, key: str) -> bool:
        try:
            with _failures():
                obstore.head(self._bucket, key)
        except FileNotFoundError:
            return False
        return True

    def fetch(self, key: str, target: Path, sha256: str) -> None:
        digest = hashlib.sha256()
        with _failures(), target.open("xb") as file:
            for chunk in obstore.get(self._bucket, key).stream(min_chunk_size=_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            target.unlink()
            raise OSError(errno.EIO, "The store has something else than was stored under this key", key)
        target.chmod(0o444)

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        if start == end:
            return iter(())
        with _failures():
            stream = obstore.get(self._bucket, key, options={"range": (start, end)}).stream(_CHUNK)

        def chunks() -> Iterator[bytes]:
            with _failures():
                for chunk in stream:
                    yield bytes(chunk)

        return chunks()

    def link(self, key: str) -> str | None:
        if self._link_lifetime is None:
            return None
        with _failures():
            return obstore.sign(self._public_bucket, "GET", key, self._link_lifetime)

    def delete(self, key: str) -> None:
        with _failures():
            obstore.delete(self._bucket, key)

    def delete_all(self, prefix: str) -> None:
        with _failures():
            for batch in obstore.list(self._bucket, prefix):
                obstore.delete(self._bucket, [item["path"] for item in batch])

    def check(self) -> None:
        # An object that is not there is a 404 like a bucket that is not; an empty list is not.
        with _failures():
            next(iter(obstore.list(self._bucket, "blobs/none")), None)


def _bucket(settings: Settings, endpoint: str | None) -> obstore.store.S3Store:
    assert settings.store_url is not None
    url = urlsplit(settings.store_url)
    # As Amazon's own tools read them, for whom an empty variable is none.
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or None
    region = settings.store_region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    chosen: obstore.store.S3Config = {"region": region or _REGION}
    if endpoint is not None:  # obstore takes no None, and knows Amazon's hosts
        chosen["endpoint"] = endpoint
    return obstore.store.S3Store(
        url.netloc,
        prefix=url.path.strip("/") or None,
        # Servers other than Amazon's have the bucket in the path and not in the host's name; Amazon's
        # certificates hold for no host name with further dots.
        virtual_hosted_style_request=endpoint is None and "." not in url.netloc,
        client_options={
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
            "connect_timeout": _SILENCE,
            "read_timeout": _SILENCE,
            "timeout": _LONGEST_REQUEST,
        },
        retry_config=_RETRY,
        config=chosen,
    )


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (BaseError, FileNotFoundError, PermissionError) as error:
        if _NO_BUCKET in str(error):
            raise StoreUnavailableError(
                "There is no such bucket; make it, or set ONNX_QAT_STORE_URL to one that is there."
            ) from error
        if isinstance(error, FileNotFoundError):
            raise
        # The first line says what happened; the others are the library's own state.
        raise StoreUnavailableError(str(error).partition("\n")[0]) from error
