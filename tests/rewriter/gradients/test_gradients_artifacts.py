"""Where generate_artifacts is right, our gradient is the same.

generate_artifacts writes past buffers or aborts the process on some graphs, so that only operators and forms
measured to be right are listed here.
"""

from __future__ import annotations

import pathlib
import sys
import types

import numpy as np
import onnx
import onnxruntime
import pytest
from gradient_cases import CASES
from gradient_check import Case, forward_model, session, with_gradients
from onnx import helper, numpy_helper

RIGHT = {
    *(
        f"{op}_{form}"
        for op in ("Add", "Sub", "Mul", "Div")
        for form in ("same", "vector", "channel", "scalar")
    ),
    *("Pow_2", "Pow_half", "Neg", "Exp", "Erf", "Sqrt", "Log", "Reciprocal", "Abs", "Sin", "Cos"),
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Max_2", "Min_2", "Max_3_broadcast"),
    *(f"{op}_{axis}" for op in ("Softmax", "LogSoftmax") for axis in (-1, 1)),
    *(
        f"Gemm_{ta}{tb}_{c}"
        for ta in (0, 1)
        for tb in (0, 1)
        for c in ("none", "N", "1N", "MN", "M1", "scalar")
    ),
    *("MatMul_2x2", "MatMul_3x2", "MatMul_3x3", "MatMul_4x4_broadcast"),
    *("Conv_1d", "Conv_2d", "Conv_2d_strided", "Conv_2d_asymmetric", "Conv_2d_dilated", "Conv_3d"),
    *("Conv_2d_grouped", "Conv_2d_depthwise", "Conv_2d_multiplier"),
    *(f"MaxPool_{form}" for form in ("2d", "2d_overlap", "2d_ceil", "1d", "3d")),
    *(f"AveragePool_{form}" for form in ("2d", "2d_overlap", "2d_ceil", "2d_include_pad", "1d")),
    *("GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split"),
    *(
        "Slice",
        "Slice_steps",
        "Gather",
        "Gather_axis_1",
        "GatherElements",
        "Expand",
        "Tile",
        "Pad",
        "Pad_crop",
    ),
    *(f"{op}_{form}" for op in ("ReduceSum", "ReduceMean") for form in ("all", "axis", "axes", "axes_kept")),
    *("CrossEntropy_log_prob", "CrossEntropy_pixels_log_prob"),  # it requires the second output
}


@pytest.fixture(scope="module")
def artifacts() -> types.ModuleType:
    """onnxruntime.training.artifacts without its package's __init__, which imports PyTorch."""
    if "onnxruntime.training" not in sys.modules:
        package = types.ModuleType("onnxruntime.training")
        package.__path__ = [str(pathlib.Path(onnxruntime.__file__).parent / "training")]
        sys.modules["onnxruntime.training"] = package
    onnxruntime.set_default_logger_severity(3)
    from onnxruntime.training import artifacts

    return artifacts


def test_the_list_names_cases() -> None:
    assert {case.name for case in CASES} >= RIGHT


@pytest.mark.parametrize("case", [case for case in CASES if case.name in RIGHT], ids=str)
def test_gradient_equals_that_of_generate_artifacts(
    case: Case, artifacts: types.ModuleType, tmp_path: pathlib.Path
) -> None:
    wrt = [f"i{i}" for i in case.wrt]
    model, feeds = parameters_as_initializers(case)
    artifacts.generate_artifacts(model, requires_grad=wrt, artifact_directory=tmp_path)
    training = onnx.load(tmp_path / "training_model.onnx")
    parameters = {f"i{i}": case.inputs[i] for i in case.wrt}
    outputs = [f"{name}_grad" for name in wrt]
    for name, array in zip(outputs, parameters.values(), strict=True):
        training.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape))
    buffers = {f"{name}_grad.accumulation.buffer": np.zeros_like(a) for name, a in parameters.items()}
    reset = {"lazy_reset_grad": np.array([True])}
    theirs = session(training).run(outputs, {**feeds, **parameters, **buffers, **reset})

    ours = session(with_gradients(model, wrt)).run([f"d_{name}" for name in wrt], feeds)
    for name, our, their in zip(wrt, ours, theirs, strict=True):
        scale = np.abs(their).max(initial=0)
        np.testing.assert_allclose(our, their.reshape(our.shape), atol=1e-5 * scale, rtol=1e-5, err_msg=name)


def parameters_as_initializers(case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The case's graph with the differentiated inputs and the weights r of the loss as initializers."""
    model = forward_model(case, "static")
    graph = model.graph
    rng = np.random.default_rng(3)
    arrays = {f"i{i}": a for i, a in enumerate(case.inputs) if a is not None and i not in case.constants}
    zeros = {f"r{k}": np.zeros((), np.float32) for k in case.used_outputs}
    ys = session(model).run([f"y{k}" for k in case.used_outputs], {**arrays, **zeros})
    for k, y in zip(case.used_outputs, ys, strict=True):
        arrays[f"r{k}"] = rng.standard_normal(y.shape).astype(np.float32)
    fixed = {f"i{i}" for i in case.wrt} | set(zeros)
    graph.initializer.extend(numpy_helper.from_array(arrays[name], name) for name in sorted(fixed))
    kept = [value for value in graph.input if value.name not in fixed]
    del graph.input[:], graph.output[1:]
    graph.input.extend(kept)
    return model, {name: array for name, array in arrays.items() if name not in fixed}
