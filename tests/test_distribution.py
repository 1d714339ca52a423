"""What is built for others to install has all that it needs, and nothing that it does not."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, made from the source distribution, which was made from what git would commit."""
    directory = tmp_path_factory.mktemp("distribution")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    packages = ["rewriter", "service", "pyproject.toml", "README.md"]
    names = subprocess.run([*listed, *packages], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True).stdout
    for name in names.decode().rstrip("\0").split("\0"):
        target = directory / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name).read_bytes())
    _build("build_sdist", directory / "source", directory)
    (sdist,) = directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    _build("build_wheel", directory / sdist.name.removesuffix(".tar.gz"), directory)
    (wheel,) = directory.glob("*.whl")
    return wheel


def _build(hook: str, source: Path, target: Path) -> None:
    """What pip does (PEP 517), without an environment of its own."""
    script = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, target], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    source = wheel.parent / "source"
    wanted = {
        path.relative_to(source).as_posix()
        for package in ("rewriter", "service")
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == wanted
    assert {"rewriter/py.typed", "service/py.typed", "service/page/static/index.html"} <= found
    assert any(name.startswith("service/migrations/versions/v0001") for name in found)


def test_what_is_installed_serves_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    script = (
        "import sys\n"
        "from fastapi.testclient import TestClient\n"
        "import service.app\n"
        "from service.settings import Settings\n"
        "assert service.__file__.startswith(sys.argv[1]), service.__file__\n"
        "with TestClient(service.app.create_app(Settings(data_dir='data', workers=0))) as client:\n"
        "    for path in ('/health/ready', '/', '/openapi.json'):\n"
        "        assert client.get(path, headers={'Host': 'localhost'}).status_code == 200, path\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, installed],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
