"""Bad input: the same stable code from the library and the command line, and nothing left behind.

The HTTP interface is checked in tests/service/test_service_real_jobs.py or beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import rewriter
from rewriter.cli import app
from rewriter.errors import ErrorCode


def linear(**changes: object) -> onnx.ModelProto:
    """y = x w, with parts of it replaced."""
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    graph = helper.make_graph(
        changes.get("nodes", [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]),
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        changes.get("initializers", [weight]),
    )
    domains = [helper.make_opsetid("", 17), *changes.get("domains", [])]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


def garbage(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"this is not a protobuf" * 10)


def truncated(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(linear().SerializeToString()[:-40])


def empty(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


def missing(folder: Path) -> None:
    del folder


def unknown_domain(folder: Path) -> None:
    nodes = [helper.make_node("Magic", ["x"], ["y"], name="trick", domain="com.example")]
    onnx.save(linear(nodes=nodes, domains=[helper.make_opsetid("com.example", 1)]), folder / "model.onnx")


def no_float_weights(folder: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    onnx.save(linear(nodes=nodes, initializers=[]), folder / "model.onnx")


def external_data(folder: Path, location: str) -> None:
    weight = TensorProto(name="w", dims=[4, 3], data_type=TensorProto.FLOAT)
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    onnx.save(linear(initializers=[weight]), folder / "model.onnx")


def escaping(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(48))
    external_data(folder, "../secret")


def data_missing(folder: Path) -> None:
    external_data(folder, "weights.bin")


BAD_MODELS: dict[Callable[[Path], None], ErrorCode] = {
    garbage: ErrorCode.MODEL_NOT_ONNX,
    truncated: ErrorCode.MODEL_NOT_ONNX,
    empty: ErrorCode.MODEL_NOT_ONNX,
    missing: ErrorCode.MODEL_NOT_FOUND,
    unknown_domain: ErrorCode.MODEL_DOMAIN_UNKNOWN,
    no_float_weights: ErrorCode.MODEL_NO_FLOAT_WEIGHTS,
    escaping: ErrorCode.EXTERNAL_DATA_OUTSIDE,
    data_missing: ErrorCode.EXTERNAL_DATA_MISSING,
}

BAD_DATA: dict[str, tuple[dict[str, np.ndarray] | bytes, ErrorCode]] = {
    "an input is missing": ({"z": np.zeros((2, 4), np.float32)}, ErrorCode.DATA_INPUT_MISSING),
    "the shape is wrong": ({"x": np.zeros((2, 5), np.float32)}, ErrorCode.DATA_SHAPE_MISMATCH),
    "the rank is wrong": ({"x": np.zeros((2, 4, 1), np.float32)}, ErrorCode.DATA_SHAPE_MISMATCH),
    "the type is wrong": ({"x": np.full((2, 4), "a")}, ErrorCode.DATA_TYPE_MISMATCH),
    "there are no samples": ({"x": np.zeros((0, 4), np.float32)}, ErrorCode.DATA_EMPTY),
    "a value is not finite": ({"x": np.full((2, 4), np.nan, np.float32)}, ErrorCode.DATA_NOT_FINITE),
    "it is not an npz": (b"PK but not a zip", ErrorCode.DATA_NOT_NPZ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    upload = tmp_path / "upload"
    upload.mkdir()
    return upload


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def require_one_line(stderr: str, code: ErrorCode) -> None:
    assert stderr.startswith("error: ")
    assert len(stderr.strip().splitlines()) == 1
    assert code.value in stderr


@pytest.mark.parametrize("make", BAD_MODELS, ids=lambda make: make.__name__)
def test_a_bad_model(make: Callable[[Path], None], folder: Path) -> None:
    make(folder)
    code = BAD_MODELS[make]
    with pytest.raises(rewriter.QatError) as caught:
        rewriter.prepare(folder / "model.onnx", folder.parent / "out" / "bundle")
    assert caught.value.code == code
    status, stderr = run("prepare", folder / "model.onnx", "-o", folder.parent / "out" / "bundle")
    assert status == 1
    require_one_line(stderr, code)
    assert list((folder.parent / "out").iterdir()) == []


@pytest.mark.parametrize("problem", BAD_DATA)
def test_bad_calibration_samples(problem: str, folder: Path) -> None:
    content, code = BAD_DATA[problem]
    onnx.save(linear(), folder / "model.onnx")
    samples = folder / "samples.npz"
    if isinstance(content, bytes):
        samples.write_bytes(content)
    else:
        np.savez(samples, **content)
    with pytest.raises(rewriter.QatError) as caught:
        rewriter.prepare(folder / "model.onnx", folder.parent / "out" / "bundle", calibration=samples)
    assert caught.value.code == code
    status, stderr = run(
        "prepare", folder / "model.onnx", "-o", folder.parent / "out" / "bundle", "--calibration", samples
    )
    assert status == 1
    require_one_line(stderr, code)
    assert list((folder.parent / "out").iterdir()) == []


def test_missing_samples_are_said(folder: Path) -> None:
    onnx.save(linear(), folder / "model.onnx")
    status, stderr = run(
        "prepare", folder / "model.onnx", "-o", folder / "bundle", "--calibration", folder / "none.npz"
    )
    assert status == 1
    require_one_line(stderr, ErrorCode.DATA_NOT_FOUND)


@pytest.mark.parametrize(
    "settings",
    [["weight_bits=1"], ["weight_bitz=8"], ["target=tensorrt"], ["calibration.method=entropy"]],
    ids=lambda settings: settings[0],
)
def test_a_wrong_recipe_is_wrong_usage(settings: list[str], folder: Path) -> None:
    onnx.save(linear(), folder / "model.onnx")
    options = [part for setting in settings for part in ("--set", setting)]
    status, stderr = run("prepare", folder / "model.onnx", "-o", folder / "bundle", *options)
    assert status == 2
    assert settings[0].split("=")[0] in stderr
    assert not (folder / "bundle").exists()


@pytest.mark.parametrize(
    "content",
    [None, b"{", b'"8 bits"', b'{"scope": "\xff"}', b"[" * 100_000],
    ids=["a directory", "no JSON", "no object", "not UTF-8", "too deep"],
)
def test_a_recipe_file_that_is_none_is_named(content: bytes | None, folder: Path) -> None:
    onnx.save(linear(), folder / "model.onnx")
    recipe = folder / "recipe.json"
    if content is None:
        recipe.mkdir()
    else:
        recipe.write_bytes(content)
    status, stderr = run("prepare", folder / "model.onnx", "-o", folder / "bundle", "--recipe", recipe)
    assert status == 2
    require_one_line(stderr, ErrorCode.RECIPE_INVALID)
    assert "recipe.json'" in stderr


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_a_learning_rate_that_cannot_be_meant_is_wrong_usage(rate: str, folder: Path) -> None:
    status, stderr = run("finetune", folder, "--data", folder / "train.npz", "--lr", rate)
    assert status == 2
    require_one_line(stderr, ErrorCode.ARGUMENT_INVALID)


def test_nothing_but_a_bundle_is_replaced(folder: Path) -> None:
    onnx.save(linear(), folder / "model.onnx")
    status, stderr = run("prepare", folder / "model.onnx", "-o", folder, "--force")
    assert status == 1
    require_one_line(stderr, ErrorCode.OUTPUT_EXISTS)
    assert (folder / "model.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare"],
        ["prepare", "model.onnx"],
        ["prepare", "model.onnx", "-o", "bundle", "--set", "weight_bits"],
        ["finetune", "bundle", "--data", "train.npz", "--device", "tpu"],
        ["finetune", "bundle", "--data", "train.npz", "--epochs", "0"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_an_existing_output_is_kept_unless_forced(folder: Path) -> None:
    onnx.save(linear(), folder / "model.onnx")
    bundle = folder / "bundle"
    assert run("prepare", folder / "model.onnx", "-o", bundle)[0] == 0
    before = (bundle / "manifest.json").read_bytes()
    status, stderr = run("prepare", folder / "model.onnx", "-o", bundle, "--set", "weight_bits=4")
    assert status == 1
    require_one_line(stderr, ErrorCode.OUTPUT_EXISTS)
    assert (bundle / "manifest.json").read_bytes() == before
    assert run("prepare", folder / "model.onnx", "-o", bundle, "--set", "weight_bits=4", "--force")[0] == 0
    assert rewriter.read_manifest(bundle).recipe.weight_bits == 4


class TestBundles:
    """finetune and finalize on something that is not, or no longer, a bundle."""

    @pytest.fixture
    def bundle(self, folder: Path) -> Path:
        onnx.save(linear(), folder / "model.onnx")
        rewriter.prepare(folder / "model.onnx", folder / "bundle")
        return folder / "bundle"

    def test_a_folder_that_is_none(self, folder: Path) -> None:
        for command in (
            ["finalize", folder, "-o", folder / "int8.onnx"],
            ["finetune", folder, "--data", folder / "x"],
        ):
            status, stderr = run(*command)
            assert status == 1
            require_one_line(stderr, ErrorCode.BUNDLE_INVALID)

    def test_a_model_that_was_damaged(self, bundle: Path) -> None:
        (bundle / "qat_model.onnx").write_bytes(b"garbage")
        status, stderr = run("finalize", bundle, "-o", bundle.parent / "int8.onnx")
        assert status == 1
        assert "qat_model.onnx" in stderr
        assert not (bundle.parent / "int8.onnx").exists()

    @pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
    def test_a_checkpoint_that_was_damaged(self, bundle: Path, content: bytes | None) -> None:
        checkpoint = bundle.parent / "checkpoint"
        checkpoint.write_bytes((bundle / "checkpoint").read_bytes()[:-100] if content is None else content)
        status, stderr = run(
            "finalize", bundle, "-o", bundle.parent / "int8.onnx", "--checkpoint", checkpoint
        )
        assert status == 1
        require_one_line(stderr, ErrorCode.CHECKPOINT_INVALID)
        assert not (bundle.parent / "int8.onnx").exists()

    def test_a_checkpoint_of_another_bundle(self, bundle: Path, folder: Path) -> None:
        other = linear(initializers=[numpy_helper.from_array(np.ones((4, 5), np.float32), "w")])
        other.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
        onnx.save(other, folder / "other.onnx")
        rewriter.prepare(folder / "other.onnx", folder / "other")
        status, stderr = run(
            "finalize", bundle, "-o", folder / "int8.onnx", "--checkpoint", folder / "other" / "checkpoint"
        )
        assert status == 1
        require_one_line(stderr, ErrorCode.CHECKPOINT_INVALID)

    @pytest.mark.parametrize("output", ["file/int8.onnx", "directory", "."])
    def test_an_output_that_cannot_be_written(
        self, bundle: Path, output: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(bundle.parent)
        Path("file").write_text("")
        Path("directory").mkdir()
        before = sorted(Path().rglob("*"))
        status, stderr = run("finalize", bundle, "-o", output)
        assert status == 1
        require_one_line(stderr, ErrorCode.OUTPUT_UNWRITABLE)
        assert sorted(Path().rglob("*")) == before
