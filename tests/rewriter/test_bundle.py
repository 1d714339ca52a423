"""A bundle appears whole or not at all, and its zip is the same bytes for the same content."""

import errno
import hashlib
import json
import os
import zipfile
from pathlib import Path

import onnx_ir as ir
import pytest

from rewriter import bundle
from rewriter.errors import ErrorCode, QatError
from rewriter.finalize import finalize
from rewriter.prepare import prepare
from tests.rewriter.training import nets


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
    (target / bundle.MANIFEST).write_text("{}")
    with pytest.raises(QatError) as caught, bundle.new_directory(target):
        pass
    assert caught.value.code == ErrorCode.OUTPUT_EXISTS
    assert [p.name for p in target.iterdir()] == [bundle.MANIFEST]
    with bundle.new_directory(target, replace=True) as folder:
        (folder / "new").write_text("")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("precious"), lambda path: make_folder(path)])
def test_what_is_no_bundle_is_never_replaced(tmp_path, make):
    target = tmp_path / "home"
    make(target)
    with pytest.raises(QatError) as caught, bundle.new_directory(target, replace=True):
        pass
    assert caught.value.code == ErrorCode.OUTPUT_EXISTS
    assert (target if target.is_file() else target / "sub" / "file").read_text() == "precious"


def make_folder(path):
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_text("precious")


def test_a_failed_replacement_keeps_the_old_directory(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / bundle.MANIFEST).write_text("precious")
    with pytest.raises(RuntimeError), bundle.new_directory(target, replace=True):
        raise RuntimeError
    assert (target / bundle.MANIFEST).read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_replacement_that_cannot_take_its_place_keeps_the_old_directory(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / bundle.MANIFEST).write_text("precious")
    rename = Path.rename

    def refuse_new(path, to):
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(QatError) as caught, bundle.new_directory(target, replace=True):
        pass
    assert caught.value.code == ErrorCode.OUTPUT_UNWRITABLE
    assert (target / bundle.MANIFEST).read_text() == "precious"


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


def test_the_current_directory_may_be_the_output(tmp_path, monkeypatch):
    (tmp_path / "bundle").mkdir()
    monkeypatch.chdir(tmp_path / "bundle")
    with bundle.new_directory(Path()) as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "bundle" / "file").exists()


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    for target in (tmp_path, tmp_path / "sub" / ".."):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(QatError, match="is a directory") as caught, bundle.new_file(target):
            pytest.fail("the work has begun")
        assert caught.value.code == ErrorCode.OUTPUT_UNWRITABLE


def test_files_beside_a_new_file_come_along(tmp_path):
    (tmp_path / "model.onnx.data").write_text("old")
    with bundle.new_file(tmp_path / "model.onnx") as path:
        path.write_text("graph")
        path.with_name("model.onnx.data").write_text("weights")
        assert (tmp_path / "model.onnx.data").read_text() == "old"
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert found == {"model.onnx": "graph", "model.onnx.data": "weights"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
@pytest.mark.parametrize("context", [bundle.new_directory, bundle.new_file])
def test_no_room_is_said_of_the_output(tmp_path, context, number):
    with pytest.raises(QatError) as caught, context(tmp_path / "output"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.code, caught.value.file) == (ErrorCode.OUTPUT_UNWRITABLE, "output")
    assert os.strerror(number) in caught.value.message
    assert caught.value.__cause__.errno == number
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_reading_is_not_taken_for_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), bundle.new_directory(tmp_path / "output"):
        (tmp_path / "input").read_bytes()


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


def prepared(folder):
    """A bundle of a small model."""
    ir.save(nets.mlp(), folder / "float.onnx")
    prepare(folder / "float.onnx", folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize("name", ["qat_model.onnx", "training_model.onnx", "eval_model.onnx", "checkpoint"])
def test_a_file_that_is_not_the_one_that_was_prepared_is_named(tmp_path, name):
    folder = prepared(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(QatError, match="prepare the bundle again") as caught:
        bundle.read_manifest(folder)
    assert (caught.value.code, caught.value.file) == (ErrorCode.BUNDLE_INVALID, name)


def test_a_large_file_is_verified_where_it_is_used(tmp_path):
    folder = prepared(tmp_path)
    large = folder / "qat_model.onnx"
    large.write_bytes(bytes(2 << 20))
    manifest = bundle.read_manifest
    document = json.loads((folder / bundle.MANIFEST).read_text())
    entry = next(entry for entry in document["files"] if entry["name"] == large.name)
    entry["bytes"] = 2 << 20
    (folder / bundle.MANIFEST).write_text(json.dumps(document))
    assert manifest(folder)
    with pytest.raises(QatError) as caught:
        manifest(folder, verify_all=True)
    assert caught.value.file == large.name


def test_a_manifest_lists_files_of_its_own_folder_only(tmp_path):
    folder = prepared(tmp_path)
    document = json.loads((folder / bundle.MANIFEST).read_text())
    document["files"][0]["name"] = "../float.onnx"
    (folder / bundle.MANIFEST).write_text(json.dumps(document))
    with pytest.raises(QatError) as caught:
        bundle.read_manifest(folder)
    assert caught.value.code == ErrorCode.BUNDLE_INVALID


@pytest.mark.parametrize("name", ["qat_model.onnx", "manifest.json", "checkpoint"])
def test_no_output_replaces_a_file_of_the_bundle(tmp_path, name):
    folder = prepared(tmp_path)
    before = (folder / name).read_bytes()
    with pytest.raises(QatError) as caught:
        finalize(folder, folder / "." / name)
    assert (caught.value.code, caught.value.file) == (ErrorCode.OUTPUT_EXISTS, name)
    assert (folder / name).read_bytes() == before


def test_replacing_does_not_delete_the_model(tmp_path):
    folder = prepared(tmp_path)
    (tmp_path / "float.onnx").rename(folder / "float.onnx")
    with pytest.raises(QatError) as caught:
        prepare(folder / "float.onnx", folder, replace=True)
    assert caught.value.code == ErrorCode.OUTPUT_EXISTS
    assert (folder / "float.onnx").exists()


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(prepared(tmp_path))
    with pytest.raises(QatError, match="working directory") as caught:
        prepare(tmp_path / "float.onnx", Path("."), replace=True)
    assert caught.value.code == ErrorCode.OUTPUT_UNWRITABLE


def test_a_directory_that_may_not_be_searched_is_said(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(QatError) as caught, bundle.new_file(tmp_path / "closed" / "model.onnx"):
        pass
    assert caught.value.code == ErrorCode.OUTPUT_UNWRITABLE


@pytest.mark.parametrize(("content", "reason"), [(b"", "2: Invalid JSON"), (b"[]", "2: Input should be")])
def test_what_is_wrong_with_a_manifest_is_said_once(tmp_path, content, reason):
    (tmp_path / bundle.MANIFEST).write_bytes(content)
    with pytest.raises(QatError, match=reason):
        bundle.read_manifest(tmp_path)
