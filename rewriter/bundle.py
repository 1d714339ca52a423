"""The bundle: a directory, or the same as a zip, that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from typing import Final

from rewriter.errors import ErrorCode, QatError
from rewriter.manifest import Digest, FileEntry, Manifest

MANIFEST: Final = "manifest.json"
QAT_MODEL: Final = "qat_model.onnx"
TRAINING_MODEL: Final = "training_model.onnx"
EVAL_MODEL: Final = "eval_model.onnx"
OPTIMIZER_MODEL: Final = "optimizer_model.onnx"
CHECKPOINT: Final = "checkpoint"
# What fine-tuning writes beside the prepared checkpoint, which stays as the manifest describes it.
TRAINED_CHECKPOINT: Final = "trained_checkpoint"
# What an interrupted fine-tuning goes on from.
TRAINING_STATE: Final = "training_state"

_CHUNK: Final = 1 << 20
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def describe(path: pathlib.Path) -> Digest:
    """SHA-256 and size of a file, read once in chunks."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return Digest(sha256=digest.hexdigest(), bytes=stream.tell())


def describe_file(path: pathlib.Path, name: str | None = None) -> FileEntry:
    """The same with the file's name, or with another one."""
    return FileEntry(name=name or path.name, **dict(describe(path)))


def read_manifest(folder: pathlib.Path, *, verify_all: bool = False) -> Manifest:
    """The manifest of a bundle directory.

    Args:
        verify_all: whether the digests of large files are compared too, not only those of small ones.

    Raises:
        QatError: `bundle_invalid` when there is none, it cannot be read, or a file that it lists is missing
            or is not the one that was prepared.
    """
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            f"{folder} is not a bundle: it has no readable {MANIFEST}. Make one with `prepare`.",
            file=MANIFEST,
        ) from error
    except QatError as error:
        error.file = MANIFEST
        raise
    for entry in manifest.files:
        _require_file(folder, entry, verify_all or entry.bytes <= _SMALL)
    return manifest


def _require_file(folder: pathlib.Path, entry: FileEntry, verify: bool) -> None:
    path = folder / entry.name
    try:
        if path.name != entry.name or not path.is_file():
            problem = f"The bundle lacks {entry.name}"
        elif path.stat().st_size != entry.bytes or (verify and describe(path).sha256 != entry.sha256):
            problem = f"{entry.name} is not the file that {MANIFEST} describes"
        else:
            return
    except OSError as error:
        problem = f"{entry.name} cannot be read ({error.strerror})"
    raise QatError(ErrorCode.BUNDLE_INVALID, f"{problem}: prepare the bundle again.", file=entry.name)


def require_elsewhere(target: pathlib.Path, bundle: pathlib.Path) -> None:
    """Raise `output_exists` if an output would replace a file that `prepare` wrote."""
    if target.name.removesuffix(".data") in _FILES and _resolved(target).parent == _resolved(bundle):
        raise QatError(
            ErrorCode.OUTPUT_EXISTS,
            f"{target} is a file of the bundle, and is not replaced: name another file.",
            file=target.name,
        )


def require_outside(target: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
    """Raise `output_exists` if replacing the directory `target` would delete what is to be read."""
    for source in sources:
        if _resolved(source).is_relative_to(_resolved(target)):
            raise QatError(
                ErrorCode.OUTPUT_EXISTS,
                f"{target} is not replaced, {source.name} lies in it: name another directory.",
                file=target.name,
            )


_FILES: Final = frozenset({MANIFEST, QAT_MODEL, TRAINING_MODEL, EVAL_MODEL, OPTIMIZER_MODEL, CHECKPOINT})
_SMALL: Final = 1 << 20


@contextlib.contextmanager
def new_directory(target: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A temporary directory that becomes `target` when the block ends without an error.

    Args:
        replace: whether a bundle that is there already is replaced. Nothing else ever is.

    Raises:
        QatError: `output_exists` when `target` is there, is not an empty directory and may not be replaced;
            `output_unwritable` when it cannot be written.
    """
    target = _resolved(target)
    occupied = _is_occupied(target)
    if occupied and not (replace and _is_directory(target) and (target / MANIFEST).is_file()):
        advice = "it is no bundle, and is not replaced" if replace else "or have it replaced (--force)"
        raise QatError(
            ErrorCode.OUTPUT_EXISTS, f"{target} exists: name another directory; {advice}.", file=target.name
        )
    if occupied and pathlib.Path.cwd().is_relative_to(target):
        raise _unwritable(target, "it is the working directory, or around it")
    with _beside(target) as staging:
        folder, former = staging / "new", staging / "former"
        folder.mkdir()
        yield folder
        if occupied:
            target.rename(former)
        try:
            folder.rename(target)
        except BaseException:
            if occupied:
                former.rename(target)
            raise


@contextlib.contextmanager
def new_file(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path, of the same name, that becomes `target` when the block ends without an error.

    Files that are written beside it (external data) come along, before it.

    Raises:
        QatError: `output_unwritable` when it cannot be written.
    """
    target = _resolved(target)
    if _is_directory(target):
        raise _unwritable(target, "it is a directory")
    with _beside(target) as staging:
        yield staging / target.name
        for path in sorted(staging.iterdir(), key=lambda path: path.name == target.name):
            path.replace(target.with_name(path.name))


def write_zip(folder: pathlib.Path, target: pathlib.Path) -> None:
    """The files of a bundle directory as a zip: stored, in name order, without dates, so the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            entry = zipfile.ZipInfo(path.name)
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as stream:
                shutil.copyfileobj(source, stream, _CHUNK)


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden directory beside `target`, so that a rename stays on one file system; it goes at the end.

    What cannot be written into it is said of `target`; errors of reading are none of its business.
    """
    staging = target.with_name(f".onnx-qat-{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise _unwritable(target, error.strerror) from error
    try:
        yield staging
    except OSError as error:
        file = pathlib.Path(error.filename) if isinstance(error.filename, str) else None
        if error.errno in _NO_ROOM or (file and (file == target or file.is_relative_to(staging))):
            # Its name alone: it may lie in the hidden directory of an output around it.
            raise _unwritable(pathlib.Path(target.name), error.strerror) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _resolved(target: pathlib.Path) -> pathlib.Path:
    """`target` with a name (`.` has none) and without links."""
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise _unwritable(target, str(error)) from error


def _is_occupied(target: pathlib.Path) -> bool:
    """Whether something is there, other than an empty directory."""
    try:
        return target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise _unwritable(target, error.strerror) from error


def _is_directory(target: pathlib.Path) -> bool:
    try:
        return target.is_dir()
    except OSError as error:
        raise _unwritable(target, error.strerror) from error


def _unwritable(target: pathlib.Path, why: str | None) -> QatError:
    return QatError(ErrorCode.OUTPUT_UNWRITABLE, f"{target} cannot be written: {why}.", file=target.name)
