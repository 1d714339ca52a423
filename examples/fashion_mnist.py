"""Fashion-MNIST (Xiao et al. 2017, MIT licence): 70000 grey images of clothes, from a Debian package.

python -m examples.fashion_mnist DIR    writes train.npz, test.npz and calibration.npz

The files are taken, in this order, from the cache folder ($ONNX_QAT_CACHE), from the installed package
`dataset-fashion-mnist`, and out of that package, which `apt-get download` fetches without root. The SHA-256
of what is in each file is pinned, wherever it comes from.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.package_files import FetchError, cache_folder, write_whole

PACKAGE: Final = "dataset-fashion-mnist"  # pinned when it was 0.0~git20200523.55506a9-1
INSTALLED: Final = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION_SAMPLES: Final = 256
INPUT_NAME: Final = "images"  # of benchmarks.resnet


class IdxFile(NamedTuple):
    """One file of the data set; `sha256` is that of its content, without the compression."""

    name: str
    sha256: str


TRAIN_IMAGES: Final = IdxFile(
    "train-images-idx3-ubyte.gz", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
)
TRAIN_LABELS: Final = IdxFile(
    "train-labels-idx1-ubyte.gz", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
)
TEST_IMAGES: Final = IdxFile(
    "t10k-images-idx3-ubyte.gz", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
)
TEST_LABELS: Final = IdxFile(
    "t10k-labels-idx1-ubyte.gz", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
)
FILES: Final = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


class Samples(NamedTuple):
    """pixels: uint8 [N, 1, 28, 28]; labels: int64 [N] in 0..9."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def images(self) -> NDArray[np.float32]:
        """The pixels in 0..1, as networks take them; four times their memory."""
        return self.pixels * np.float32(1 / 255)

    def part(self, start: int, count: int) -> Samples:
        """`count` samples from `start` on, or as many as there are."""
        end = start + count
        return Samples(self.pixels[start:end], self.labels[start:end])

    def save(self, path: Path) -> None:
        """Write an npz with one array for the network's input and one for the labels of its loss."""
        np.savez(path, **{INPUT_NAME: self.images, "labels": self.labels})  # type: ignore[arg-type]


class FashionMnist(NamedTuple):
    """60000 images to train on and 10000 to test with, in the order of the files; classes are balanced."""

    train: Samples
    test: Samples

    @property
    def calibration(self) -> Samples:
        """The first `CALIBRATION_SAMPLES` of the training images."""
        return self.train.part(0, CALIBRATION_SAMPLES)


@functools.cache
def load_fashion_mnist() -> FashionMnist:
    """Read the data set; it is fetched the first time.

    Raises:
        FetchError: it is in none of the places, or is not what was pinned.
    """
    content = dict(zip(FILES, _contents(), strict=True))
    return FashionMnist(
        Samples(parse_images(content[TRAIN_IMAGES]), parse_labels(content[TRAIN_LABELS])),
        Samples(parse_images(content[TEST_IMAGES]), parse_labels(content[TEST_LABELS])),
    )


def parse_images(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an idx3 file: a big-endian header of magic 2051, count, rows and columns."""
    magic, count, rows, columns = np.frombuffer(data, ">i4", 4).tolist()
    assert magic == 2051, magic
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, 1, rows, columns)


def parse_labels(data: bytes) -> NDArray[np.int64]:
    """The labels of an idx1 file: a big-endian header of magic 2049 and count."""
    magic, count = np.frombuffer(data, ">i4", 2).tolist()
    assert magic == 2049, magic
    return np.frombuffer(data, np.uint8, count, offset=8).astype(np.int64)


# --- Where the files come from. ---


def _contents() -> list[bytes]:
    """What is in each of `FILES`."""
    for folder in (cache_folder() / PACKAGE, INSTALLED):
        found = [_verified(file, _read(folder / file.name)) for file in FILES]
        if None not in found:
            return [data for data in found if data is not None]
    compressed = _from_package(_downloaded_package())
    contents = []
    for file in FILES:
        data = _verified(file, compressed.get(file.name))
        if data is None:
            raise FetchError(
                f"{file.name} of the Debian package {PACKAGE} is missing or is not the pinned one: its "
                f"content must have SHA-256 {file.sha256}."
            )
        contents.append(data)
    for file in FILES:
        write_whole(cache_folder() / PACKAGE / file.name, compressed[file.name])
    return contents


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _verified(file: IdxFile, compressed: bytes | None) -> bytes | None:
    """The content, if it is the pinned one."""
    try:
        data = gzip.decompress(compressed or b"")
    except (OSError, EOFError, zlib.error):
        return None
    return data if hashlib.sha256(data).hexdigest() == file.sha256 else None


def _downloaded_package() -> bytes:
    """The .deb file. Where the system's package lists do not name it, lists of our own are fetched."""
    with tempfile.TemporaryDirectory(prefix="onnx-qat-") as name:
        folder = Path(name)
        (folder / "lists" / "partial").mkdir(parents=True)
        own_lists = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}", "Debug::NoLocking=1"]
        reasons = []
        for options in ([], own_lists):
            if options and (reason := _apt_get(folder, options, "update")):
                reasons.append(reason)
            if reason := _apt_get(folder, options, "download", PACKAGE):
                reasons.append(reason)
                continue
            (package,) = folder.glob("*.deb")
            return package.read_bytes()
    raise FetchError(
        f"Fashion-MNIST is not here, and the Debian package that holds it cannot be downloaded "
        f"({'; '.join(dict.fromkeys(reasons))}). On Debian or Ubuntu: apt-get install {PACKAGE}. Elsewhere "
        f"put {', '.join(file.name for file in FILES)} into {cache_folder() / PACKAGE}."
    )


def _apt_get(folder: Path, options: list[str], *arguments: str) -> str | None:
    """Run apt-get in `folder`; why it failed, None if it did not."""
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
    command += [word for option in options for word in ("-o", option)]
    try:
        result = subprocess.run(
            [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return "there is no apt-get"
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
    return " ".join(lines) or f"exit status {result.returncode}"


def _from_package(package: bytes) -> dict[str, bytes]:
    """The files below the data set's folder in a .deb, by name, still compressed."""
    files = {}
    for member, data in _ar_members(package):
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                for entry in archive:
                    stream = archive.extractfile(entry)
                    if stream is not None and Path("/", entry.name).parent == INSTALLED:
                        files[Path(entry.name).name] = stream.read()
    return files


def _ar_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of the members: headers of 60 characters, the size in columns 48 to 58."""
    position = 8  # behind "!<arch>\n"
    while position + 60 <= len(archive):
        header = archive[position : position + 60].decode("ascii", errors="replace")
        size = int(header[48:58])
        yield header[:16].strip().removesuffix("/"), archive[position + 60 : position + 60 + size]
        position += 60 + size + size % 2


def main() -> int:
    parser = argparse.ArgumentParser(description="Write Fashion-MNIST as npz files for benchmarks.resnet.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    try:
        data = load_fashion_mnist()
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test", "calibration"):
        samples: Samples = getattr(data, name)
        samples.save(folder / f"{name}.npz")
        print(f"{folder / name}.npz  {len(samples.labels)} images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
