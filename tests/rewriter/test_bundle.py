"""A bundle appears whole or not at all, and its zip is the same bytes for the same content."""

import hashlib
import zipfile

import pytest

from rewriter import bundle
from rewriter.errors import ErrorCode, QatError


def test_a_new_directory_appears_when_the_work_is_done(tmp_path):
    target = tmp_path / "nested" / "bundle"
    with bundle.new_directory(target) as folder:
        (folder / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_nothing_is_left_behind_when_the_work_fails(tmp_path):
    with pytest.raises(RuntimeError), bundle.new_directory(tmp_path / "bundle") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), bundle.new_file(tmp_path / "model.onnx") as path:
        path.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_replacing_is_asked_for(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "trained").write_text("precious")
    with pytest.raises(QatError) as caught, bundle.new_directory(target):
        pass
    assert caught.value.code == ErrorCode.OUTPUT_EXISTS
    assert (target / "trained").read_text() == "precious"
    with bundle.new_directory(target, replace=True) as folder:
        (folder / "new").write_text("")
    assert [p.name for p in target.iterdir()] == ["new"]


def test_a_failed_replacement_keeps_the_old_directory(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "trained").write_text("precious")
    with pytest.raises(RuntimeError), bundle.new_directory(target, replace=True):
        raise RuntimeError
    assert (target / "trained").read_text() == "precious"


def test_an_empty_directory_may_be_the_output(tmp_path):
    (tmp_path / "bundle").mkdir()
    with bundle.new_directory(tmp_path / "bundle") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "bundle" / "file").exists()


def test_a_parent_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for context in (bundle.new_directory, bundle.new_file):
        with pytest.raises(QatError) as caught, context(tmp_path / "file" / "output"):
            pass
        assert caught.value.code == ErrorCode.OUTPUT_UNWRITABLE


def test_a_description_has_digest_and_size(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 3_000_000)
    entry = bundle.describe_file(path)
    assert (entry.name, entry.bytes) == ("weights", 3_000_000)
    assert entry.sha256 == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_the_zip_holds_the_same_files_in_the_same_bytes_every_time(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / name).write_text(f"content of {name}")
    bundle.write_zip(folder, tmp_path / "1.zip")
    (folder / "a").touch()
    bundle.write_zip(folder, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a", "b"]
        assert archive.read("a") == b"content of a"


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"schema_version": 99}'])
def test_a_directory_without_a_manifest_is_not_a_bundle(tmp_path, content):
    if content is not None:
        (tmp_path / bundle.MANIFEST).write_bytes(content)
    with pytest.raises(QatError) as caught:
        bundle.read_manifest(tmp_path)
    assert caught.value.code == ErrorCode.BUNDLE_INVALID
    assert caught.value.file == bundle.MANIFEST
