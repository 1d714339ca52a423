"""What `import rewriter` does: nothing that takes time, and functions win over modules of the same name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rewriter


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_importing_it_imports_neither_onnx_nor_onnxruntime() -> None:
    done = python(
        "import sys, rewriter\n"
        "print([name for name in ('onnx', 'onnx_ir', 'onnxruntime', 'numpy') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import rewriter",
        "import rewriter.prepare, rewriter.finalize, rewriter.finetune, rewriter",
        "import rewriter.finalize.weights, rewriter",
        "from rewriter.finetune import finetune; from rewriter.prepare import prepare; import rewriter",
        "from rewriter import prepare, finalize, finetune; import rewriter.prepare, rewriter.finalize.biases",
        "import rewriter; rewriter.prepare; import rewriter.prepare, rewriter.finetune, rewriter.finalize",
        "import importlib, rewriter; importlib.import_module('rewriter.prepare')",
    ],
)
def test_functions_win_over_modules_in_any_order_of_imports(imports: str) -> None:
    done = python(
        f"{imports}\n"
        "import types\n"
        "from rewriter import prepare, finalize, finetune\n"
        "for function in (prepare, finalize, finetune):\n"
        "    assert isinstance(function, types.FunctionType), function\n"
        "    assert getattr(rewriter, function.__name__) is function\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", rewriter.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(rewriter, name)
    assert getattr(value, "__name__", name) in (name, "Callable")
    assert name in dir(rewriter)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rewriter.nothing  # noqa: B018


BLOCKED = "import sys; sys.modules['onnxruntime'] = None\n"


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["serve", "--help"]])
def test_the_help_needs_no_onnxruntime(arguments: list[str]) -> None:
    done = python(BLOCKED + f"from service.cli import app; app({arguments!r})")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "model.onnx", "-o", "bundle"],
        ["finetune", "bundle", "--data", "data.npz"],
        ["finalize", "bundle", "-o", "model.int8.onnx"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_onnxruntime_a_command_says_what_to_install(arguments: list[str]) -> None:
    done = python(BLOCKED + f"from service.cli import app; app({arguments!r})")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "training_runtime_missing" in done.stderr
    assert "[cpu]" in done.stderr


def test_without_the_training_build_prepare_says_so_before_it_works() -> None:
    done = python(
        "import onnxruntime.capi, sys, types\n"
        "native = types.ModuleType('inference only')\n"
        "sys.modules['onnxruntime.capi._pybind_state'] = onnxruntime.capi._pybind_state = native\n"
        "from service.cli import app; app(['prepare', 'missing.onnx', '-o', 'bundle'])"
    )
    assert done.returncode == 1
    assert "training_runtime_missing" in done.stderr
