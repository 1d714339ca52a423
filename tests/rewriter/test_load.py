"""What `load` accepts, and how it says no."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rewriter import load as load_module
from rewriter.errors import ErrorCode, QatError
from rewriter.load import LoadLimits, external_data_files, load, load_from_bundle, save


def linear_model(weight: TensorProto | None = None, **settings: object) -> onnx.ModelProto:
    """y = x @ w"""
    if weight is None:
        weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [weight],
    )
    settings = {"opset_imports": [helper.make_opsetid("", 18)], "ir_version": 8, **settings}
    return helper.make_model(graph, **settings)


def write(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def refusal(path: Path, **limits: int) -> QatError:
    with pytest.raises(QatError) as caught:
        load(path, limits=LoadLimits(**limits))
    return caught.value


def test_a_valid_model_is_loaded(tmp_path):
    model = load(write(tmp_path, linear_model()))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_array_equal(
        model.graph.initializers["w"].const_value.numpy(), np.arange(6).reshape(3, 2)
    )


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_path_that_is_no_file_is_not_found(tmp_path, make):
    make(tmp_path / "model.onnx")
    error = refusal(tmp_path / "model.onnx")
    assert error.code == ErrorCode.MODEL_NOT_FOUND
    assert error.file == "model.onnx"


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"PK\x03\x04", linear_model().SerializeToString()[:-5], b"\x08\x08"]
)
def test_what_is_not_a_whole_model_is_not_onnx(tmp_path, content):
    assert refusal(write(tmp_path, content)).code == ErrorCode.MODEL_NOT_ONNX


@given(st.data())
def test_a_damaged_model_is_refused_or_loaded_but_never_fails_otherwise(tmp_path_factory, data):
    content = bytearray(linear_model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("damaged"), bytes(content))
    with contextlib.suppress(QatError):
        load(path)


def test_an_unknown_domain_is_named_with_its_node(tmp_path):
    model = linear_model(opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("onnx.brevitas", 1)])
    model.graph.node[0].domain = "onnx.brevitas"
    error = refusal(write(tmp_path, model))
    assert error.code == ErrorCode.MODEL_DOMAIN_UNKNOWN
    assert error.node == "product"
    assert "onnx.brevitas" in error.message


def test_an_operator_its_opset_does_not_have_is_named_with_its_node(tmp_path):
    model = linear_model()
    model.graph.node[0].op_type = "MatMull"
    error = refusal(write(tmp_path, model))
    assert (error.code, error.node) == (ErrorCode.MODEL_INVALID, "product")
    assert "MatMull" in error.message


def test_an_unnamed_node_is_named_by_its_output(tmp_path):
    model = linear_model()
    model.graph.node[0].op_type, model.graph.node[0].name = "Gelu", ""  # Gelu came with opset 20
    assert refusal(write(tmp_path, model)).node == "Gelu -> y"


@pytest.mark.parametrize("version", [0, 999])
def test_an_opset_from_the_future_is_unsupported(tmp_path, version):
    model = linear_model(opset_imports=[helper.make_opsetid("", version)])
    assert refusal(write(tmp_path, model)).code == ErrorCode.MODEL_OPSET_UNSUPPORTED


def test_a_model_without_opset_is_invalid(tmp_path):
    model = linear_model()
    model.ClearField("opset_import")
    assert refusal(write(tmp_path, model)).code == ErrorCode.MODEL_INVALID


def _undefined_input(graph: onnx.GraphProto) -> None:
    graph.node[0].input[1] = "missing"


def _cycle(graph: onnx.GraphProto) -> None:
    graph.node[0].input[0] = "y"


def _two_producers(graph: onnx.GraphProto) -> None:
    graph.node.append(graph.node[0])


def _output_from_nowhere(graph: onnx.GraphProto) -> None:
    graph.output[0].name = "z"


def _two_initializers(graph: onnx.GraphProto) -> None:
    graph.initializer.append(graph.initializer[0])


def _no_nodes(graph: onnx.GraphProto) -> None:
    del graph.node[:]


def _short_data(graph: onnx.GraphProto) -> None:
    graph.initializer[0].raw_data = b"1234"


def _too_many_dimensions_for_the_data(graph: onnx.GraphProto) -> None:
    graph.initializer[0].dims[:] = [2**40, 2**40]


def _negative_dimension(graph: onnx.GraphProto) -> None:
    graph.initializer[0].dims[:] = [-3, -2]


def _unknown_element_type(graph: onnx.GraphProto) -> None:
    graph.initializer[0].data_type = 99


def _unknown_attribute(graph: onnx.GraphProto) -> None:
    graph.node[0].attribute.append(helper.make_attribute("surprise", 1))


@pytest.mark.parametrize(
    "damage",
    [
        _undefined_input,
        _cycle,
        _two_producers,
        _output_from_nowhere,
        _two_initializers,
        _no_nodes,
        _short_data,
        _negative_dimension,
        _unknown_element_type,
        _unknown_attribute,
    ],
)
def test_a_graph_that_is_not_valid_is_refused(tmp_path, damage):
    model = linear_model()
    damage(model.graph)
    assert refusal(write(tmp_path, model)).code == ErrorCode.MODEL_INVALID


@pytest.mark.parametrize("text", [b"product", b"MatMul", b"w", b"N"])
def test_names_that_are_not_text_are_refused(tmp_path, text):
    damaged = linear_model().SerializeToString().replace(text, b"\xff" * len(text))
    assert refusal(write(tmp_path, damaged)).code == ErrorCode.MODEL_INVALID


def test_a_shape_that_promises_terabytes_is_refused(tmp_path):
    model = linear_model()
    _too_many_dimensions_for_the_data(model.graph)
    assert refusal(write(tmp_path, model)).code == ErrorCode.MODEL_TOO_LARGE


@pytest.mark.parametrize(
    "limits",
    [{"file_bytes": 10}, {"weight_bytes": 23}, {"messages": 9}, {"nodes": 0}, {"tensors": 0}, {"rank": 1}],
)
def test_limits(tmp_path, limits):
    assert refusal(write(tmp_path, linear_model()), **limits).code == ErrorCode.MODEL_TOO_LARGE


def nested_ifs(depth: int) -> onnx.GraphProto:
    node = helper.make_node("Relu", ["x"], ["y"])
    for _ in range(depth):
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        branch = helper.make_graph([node], "branch", [], [output])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )


def test_nesting_is_limited(tmp_path):
    model = helper.make_model(nested_ifs(4), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = write(tmp_path, model)
    assert refusal(path, nesting=3).code == ErrorCode.MODEL_TOO_LARGE
    assert load(path, limits=LoadLimits(nesting=4)) is not None


# Model-local functions.


def function_model(functions: list[onnx.FunctionProto], op_type: str) -> onnx.ModelProto:
    model = linear_model(
        functions=functions,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
    )
    model.graph.node.insert(0, helper.make_node(op_type, ["x"], ["h"], domain="local", name="call"))
    model.graph.node[1].input[0] = "h"
    return model


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, imports)


def call(op_type: str, x: str, y: str) -> onnx.NodeProto:
    return helper.make_node(op_type, [x], [y], domain="local")


def test_functions_are_inlined(tmp_path):
    twice = function("Twice", [helper.make_node("Add", ["a", "a"], ["b"])])
    model = load(write(tmp_path, function_model([twice], "Twice")))
    assert [node.op_type for node in model.graph] == ["Add", "MatMul"]
    assert not model.functions


def test_functions_that_multiply_without_bound_are_refused(tmp_path):
    functions = [function("F0", [helper.make_node("Relu", ["a"], ["b"])])]
    for level in range(1, 40):
        inner = f"F{level - 1}"
        functions.append(function(f"F{level}", [call(inner, "a", "m"), call(inner, "m", "b")]))
    error = refusal(write(tmp_path, function_model(functions, "F39")))
    assert error.code == ErrorCode.MODEL_TOO_LARGE


def test_a_function_that_calls_itself_is_refused(tmp_path):
    loop = function("Loop", [call("Loop", "a", "b")])
    assert refusal(write(tmp_path, function_model([loop], "Loop"))).code == ErrorCode.MODEL_INVALID


# External data.


def external_model(location: str, **entries: object) -> onnx.ModelProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 2])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    return linear_model(weight)


WEIGHT = np.arange(6, dtype=np.float32)


def test_external_data_is_mapped_not_copied(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"1234" + WEIGHT.tobytes())
    model = load(write(tmp_path, external_model("weights/w.bin", offset=4, length=24)))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy().ravel(), WEIGHT)
    assert not tensor.numpy().flags.owndata


@pytest.mark.parametrize(
    "location", ["../w.bin", "a/../../w.bin", "/etc/hostname", "", "..\\w.bin", "w\0.bin"]
)
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    error = refusal(write(folder, external_model(location)))
    assert error.code == ErrorCode.EXTERNAL_DATA_OUTSIDE


@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_links_to_data_outside_the_folder_are_refused(tmp_path, make_link):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    make_link(tmp_path / "w.bin", folder / "w.bin")
    assert refusal(write(folder, external_model("w.bin"))).code == ErrorCode.EXTERNAL_DATA_OUTSIDE


def test_external_data_of_a_subgraph_is_checked_too(tmp_path):
    graph = nested_ifs(1)
    branch = graph.node[0].attribute[0].g
    branch.initializer.append(external_model("../w.bin").graph.initializer[0])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert refusal(write(tmp_path, model)).code == ErrorCode.EXTERNAL_DATA_OUTSIDE


@pytest.mark.parametrize(
    ("data", "entries"), [(None, {}), (WEIGHT.tobytes()[:-1], {}), (WEIGHT.tobytes(), {"offset": 1})]
)
def test_missing_or_short_external_data_names_the_file(tmp_path, data, entries):
    if data is not None:
        (tmp_path / "w.bin").write_bytes(data)
    error = refusal(write(tmp_path, external_model("w.bin", **entries)))
    assert error.code == ErrorCode.EXTERNAL_DATA_MISSING
    assert error.file == "w.bin"


@pytest.mark.parametrize("entries", [{"offset": -4}, {"length": 4}, {"offset": "far"}])
def test_an_impossible_range_of_external_data_is_invalid(tmp_path, entries):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    error = refusal(write(tmp_path, external_model("w.bin", **entries)))
    assert error.code == ErrorCode.MODEL_INVALID


# Saving.


def test_a_saved_model_is_read_back(tmp_path):
    model = load(write(tmp_path, linear_model()))
    assert save(model, tmp_path / "copy.onnx") == [tmp_path / "copy.onnx"]
    copy = load(tmp_path / "copy.onnx")
    np.testing.assert_array_equal(
        copy.graph.initializers["w"].const_value.numpy(), np.arange(6).reshape(3, 2)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.onnx", "model.onnx"]


def test_external_data_is_embedded_in_a_saved_model(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    model = load(write(tmp_path, external_model("w.bin")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save(model, elsewhere / "copy.onnx")
    copy = load(elsewhere / "copy.onnx")
    np.testing.assert_array_equal(copy.graph.initializers["w"].const_value.numpy().ravel(), WEIGHT)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_large_weights_go_to_a_file_beside_the_model(tmp_path, monkeypatch):
    weight = np.arange(300, dtype=np.float32).reshape(3, 100)
    model = load(write(tmp_path, linear_model(numpy_helper.from_array(weight, "w"))))
    monkeypatch.setattr(load_module, "EXTERNAL_DATA_THRESHOLD", 1000)
    files = save(model, tmp_path / "copy.onnx")
    assert [path.name for path in files] == ["copy.onnx", "copy.onnx.data"]
    np.testing.assert_array_equal(
        load(tmp_path / "copy.onnx").graph.initializers["w"].const_value.numpy(), weight
    )


def test_files_with_external_data_are_listed_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(WEIGHT.tobytes())
    assert external_data_files(load(write(tmp_path, external_model("sub/w.bin")))) == ["sub/w.bin"]
    assert external_data_files(load(write(tmp_path, linear_model()))) == []


def test_a_damaged_model_of_a_bundle_is_a_damaged_bundle(tmp_path):
    with pytest.raises(QatError, match="prepare the bundle again") as caught:
        load_from_bundle(write(tmp_path, b"garbage"))
    assert (caught.value.code, caught.value.file) == (ErrorCode.BUNDLE_INVALID, "model.onnx")


def test_real_models_are_loaded(real_model):
    for name in ("mnist-conv", "ppocr2-cls", "light-resnet50", "minilm-l3"):
        assert len(load(real_model(name)).graph) > 0


@pytest.mark.parametrize(("path", "what"), [(".", "directory"), ("/dev/zero", "device")])
def test_what_is_no_file_is_said(path, what):
    with pytest.raises(QatError, match=what) as caught:
        load(path)
    assert caught.value.code == ErrorCode.MODEL_NOT_FOUND
