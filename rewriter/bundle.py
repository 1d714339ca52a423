"""The bundle: a directory, or the same as a zip, that appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from typing import Final

from rewriter.errors import ErrorCode, QatError
from rewriter.manifest import FileEntry, Manifest, Source

MANIFEST: Final = "manifest.json"
QAT_MODEL: Final = "qat_model.onnx"
TRAINING_MODEL: Final = "training_model.onnx"
EVAL_MODEL: Final = "eval_model.onnx"
OPTIMIZER_MODEL: Final = "optimizer_model.onnx"
CHECKPOINT: Final = "checkpoint"

_CHUNK = 1 << 20


def describe_file(path: pathlib.Path) -> FileEntry:
    """Name, SHA-256 and size of a file, read once in chunks."""
    source = describe_source(path)
    return FileEntry(name=path.name, sha256=source.sha256, bytes=source.bytes)


def describe_source(path: pathlib.Path) -> Source:
    """SHA-256 and size of a file, read once in chunks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Source(sha256=digest.hexdigest(), bytes=size)


def read_manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of a bundle directory.

    Raises:
        QatError: `bundle_invalid` when there is none, it cannot be read, or a file that it lists is missing.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            f"{folder} is not a bundle: it has no readable {MANIFEST}. Make one with `prepare`.",
            file=MANIFEST,
        ) from error
    manifest = Manifest.from_json(data)
    for entry in manifest.files:
        if not (folder / entry.name).is_file():
            raise QatError(
                ErrorCode.BUNDLE_INVALID, f"The bundle lacks {entry.name}: prepare it again.", file=entry.name
            )
    return manifest


@contextlib.contextmanager
def new_directory(target: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A temporary directory beside `target` that becomes `target` when the block ends without an error.

    Raises:
        QatError: `output_exists` when `target` is there, is not an empty directory and `replace` is false;
            `output_unwritable` when its parent cannot be written.
    """
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not replace:
        raise QatError(
            ErrorCode.OUTPUT_EXISTS,
            f"{target} exists already: name another directory, or say that it may be replaced.",
            file=target.name,
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _beside(target)
        staging.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield staging
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def new_file(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `target` that becomes `target` when the block ends without an error.

    Raises:
        QatError: `output_unwritable` when the directory cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _beside(target)
        staging.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def write_zip(folder: pathlib.Path, target: pathlib.Path) -> None:
    """The files of a bundle directory as a zip: stored, in name order, without dates, so the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            entry = zipfile.ZipInfo(path.name)
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as stream:
                shutil.copyfileobj(source, stream, _CHUNK)


def _beside(target: pathlib.Path) -> pathlib.Path:
    """A new hidden name in the same directory, so that a rename stays on one file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{target.suffix}")


def _unwritable(target: pathlib.Path, error: OSError) -> QatError:
    return QatError(
        ErrorCode.OUTPUT_UNWRITABLE,
        f"{target} cannot be written: {error.strerror or error}.",
        file=target.name,
    )
