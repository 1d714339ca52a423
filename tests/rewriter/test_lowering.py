"""Q/DQ pairs compute exactly what `quantization.quantize` and `dequantize` say, in both forms."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.fake_quantize import is_fake_quantize, make
from rewriter.finalize.biases import quantize_biases
from rewriter.finalize.weights import quantize_weights
from rewriter.fold.activations import absorb_activations
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.load import load
from rewriter.lowering import Saturation, lower
from rewriter.normalize import normalize
from rewriter.quantization import IntegerRange, dequantize, quantize
from rewriter.recipe import Recipe
from tests.rewriter.graphs import graph, listing, quantized, run

FORMS: tuple[Saturation, ...] = ("before", "between")


@dataclasses.dataclass(frozen=True)
class Case:
    range: IntegerRange
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bits = draw(st.integers(2, 8))
    kind = draw(st.sampled_from(("weight", "symmetric", "asymmetric")))
    if kind == "weight":
        range_ = IntegerRange.for_weights(bits)
    else:
        range_ = IntegerRange.for_activations(bits, symmetric=kind == "symmetric")
    axis = draw(st.sampled_from((None, 0, 1, 2)))
    shape = () if axis is None else ((3, 4, 5)[axis],)
    exponents = draw(st.lists(st.floats(-18, 8), min_size=5, max_size=5))
    scale = (
        np.exp2(np.array(exponents, np.float32))[: shape[0]] if shape else np.exp2(np.float32(exponents[0]))
    )
    low = range_.qmin if kind == "asymmetric" else 0
    high = range_.qmax if kind == "asymmetric" else 0
    zero_point = np.full(shape, draw(st.integers(low, high)), range_.dtype)
    return Case(range_, np.asarray(scale, np.float32).reshape(shape), zero_point, axis)


def fake_quantize_model(case: Case, *, constant: np.ndarray | None = None, on_grid: bool = False) -> ir.Model:
    """y = FakeQuantize(x) of a [3,4,5] tensor."""
    model = graph(
        "g (float[3,4,5] u) => (y) <float[3,4,5] x> { y = Relu(x) }"
        if constant is not None
        else "g (float[3,4,5] x) => (y) { y = Relu(x) }",
        **({} if constant is None else {"x": constant}),
    )
    (relu,) = model.graph
    x = relu.inputs[0]
    scale, zero_point = (
        ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(dtype))
        for name, array, dtype in (
            ("q_scale", case.scale, ir.DataType.FLOAT),
            ("q_zero_point", case.zero_point, ir.DataType.from_numpy(case.zero_point.dtype)),
        )
    )
    for value in (scale, zero_point):
        value.shape = ir.Shape(case.scale.shape)
        model.graph.register_initializer(value)
    node = make(x, scale, zero_point, case.range, axis=case.axis, on_grid=on_grid)
    node.outputs[0].name = "y"
    model.graph.append(node)
    model.graph.remove(relu, safe=False)
    model.graph.outputs[0] = node.outputs[0]
    return model


def interesting(case: Case) -> np.ndarray:
    """Ties, both ends of the range, their neighbours, and values far outside, as float32."""
    rng = np.random.default_rng(0)
    steps = rng.integers(case.range.qmin - 3, case.range.qmax + 4, (3, 4, 5)) - case.zero_point.min().astype(
        int
    )
    steps = steps + rng.choice([0, 0.5, -0.5, 0.25, 0.499999, 300.0, -300.0], (3, 4, 5))
    shape = [1, 1, 1]
    if case.axis is not None:
        shape[case.axis] = -1
    x: np.ndarray = (steps * case.scale.astype(np.float64).reshape(shape)).astype(np.float32)
    neighbour = np.nextafter(x, rng.choice(np.array([-np.inf, np.inf], np.float32), x.shape))
    return np.where(rng.random(x.shape) < 0.5, x, neighbour)


@settings(max_examples=120)
@given(case=cases(), form=st.sampled_from((*FORMS, "for training")), constant=st.booleans())
def test_equals_numpy_exactly(case: Case, form: Saturation | Literal["for training"], constant: bool) -> None:
    x = interesting(case)
    model = fake_quantize_model(case, constant=x if constant else None)
    if form == "for training":
        lower(model, saturation="before", for_training=True)
    else:
        lower(model, saturation=form)
    expected = dequantize(
        quantize(x, case.scale, case.zero_point, case.range, case.axis),
        case.scale,
        case.zero_point,
        case.axis,
    )
    (actual,) = run(model, u=x) if constant else run(model, x=x)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_full_ranges_need_nothing_but_the_pair(form: Saturation) -> None:
    model = fake_quantize_model(
        Case(IntegerRange(0, 255), np.array(0.1, np.float32), np.array(3, np.uint8), None)
    )
    lower(model, saturation=form)
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("form", FORMS)
def test_tensors_on_the_grid_are_not_saturated_again(form: Saturation) -> None:
    case = Case(IntegerRange(0, 15), np.array(0.1, np.float32), np.array(3, np.uint8), None)
    model = fake_quantize_model(case, on_grid=True)
    lower(model, saturation=form)
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(
    ("axis", "spelled_out"), [(None, False), (0, True), (1, True), (2, True), (-1, True)]
)
def test_for_training_per_channel_quantizers_are_spelled_out(axis: int | None, spelled_out: bool) -> None:
    shape = () if axis is None else ((3, 4, 5)[axis],)
    case = Case(IntegerRange(-127, 127), np.full(shape, 0.1, np.float32), np.zeros(shape, np.int8), axis)
    for for_training in (True, False):
        model = fake_quantize_model(case)
        lower(model, saturation="before", for_training=for_training)
        pair = [node.op_type for node in model.graph][-2:] == ["QuantizeLinear", "DequantizeLinear"]
        assert pair != (spelled_out and for_training)


def test_float_bounds_follow_a_trained_scale() -> None:
    """Whoever writes another scale into qat_model.onnx gets the right saturation with it."""
    case = Case(IntegerRange(0, 15), np.array(0.1, np.float32), np.array(3, np.uint8), None)
    model = fake_quantize_model(case)
    lower(model, saturation="before")
    trained = np.array(0.37, np.float32)
    model.graph.initializers["q_scale"].const_value = ir.tensor(trained, name="q_scale")
    x = np.random.default_rng(0).uniform(-9, 9, (3, 4, 5)).astype(np.float32)
    expected = dequantize(quantize(x, trained, case.zero_point, case.range), trained, case.zero_point)
    np.testing.assert_array_equal(run(model, x=x)[0], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_standard_onnx_only(form: Saturation, bits: int) -> None:
    model = graph(
        "g (float[N,4,8,8] x) => (y, z) <float[4,4,3,3] w, float[4,6,2,2] v> "
        "{ a = Conv(x, w) r = Relu(a) y = ConvTranspose(r, v) z = Add(r, a) }"
    )
    quantized(model, Recipe(weight_bits=bits, activation_bits=bits))
    del model.opset_imports["qat"]
    outputs = [output.name for output in model.graph.outputs]
    lower(model, saturation=form)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [output.name for output in proto.graph.output] == outputs
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)


def test_bounds_of_one_scale_are_computed_once() -> None:
    model = graph(
        "g (float[N,4,8,8] x) => (y) <float[4,4,1,1] w1, float[4,4,1,1] w2, float[4,8,1,1] w3> "
        "{ a = Conv(x, w1) b = Conv(x, w2) c = Concat<axis=1>(a, b) y = Conv(c, w3) }"
    )
    quantized(model, Recipe(activation_bits=4))
    lower(model, saturation="before")
    assert listing(model).count("Mul(a_scale") == 2


INTEGER = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger")
FLOAT = ("Conv", "FusedConv", "MatMul", "Gemm", "FusedGemm", "FusedMatMul")


def layer_kernels(model: ir.Model, path: Path) -> Counter[str]:
    """Layers of the model by kernel after all of onnxruntime's optimizations."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    counted = Counter(node.op_type for node in onnx.load(path).graph.node)
    return Counter({op: counted[op] for op in (*INTEGER, *FLOAT) if counted[op]})


def for_deployment(model: ir.Model, recipe: Recipe) -> None:
    quantized(model, recipe)
    absorb_activations(model)
    quantize_biases(model)
    quantize_weights(model)
    lower(model, saturation="between")
    assert not any(is_fake_quantize(node) for node in model.graph)


RECIPES = [
    Recipe(),
    Recipe(symmetric=True),
    Recipe(weight_bits=4, activation_bits=4),
    Recipe(weight_bits=4, activation_bits=4, symmetric=True, per_channel=False),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["w8a8", "w8a8_symmetric", "w4a4", "w4a4_symmetric"])
def test_onnxruntime_finds_its_integer_kernels(recipe: Recipe, tmp_path: Path) -> None:
    model = graph(
        "g (float[N,3,8,8] x) => (y) <float[4,3,3,3] w1, float[4] b1, float[4,1,3,3] w2, float[4,4,1,1] w3, "
        "float[8,6] w4, float[6] b4, float zero, float six, int64[2] flat, float[6,5] w5> { "
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) "
        "b = Conv<group=4, pads=[1,1,1,1]>(r, w2) c = Clip(b, zero, six) "
        "d = Conv(c, w3) s = Add(d, r) t = Relu(s) e = Concat<axis=1>(t, c) "
        "p = GlobalAveragePool(e) f = Reshape(p, flat) g = Gemm(f, w4, b4) h = Relu(g) y = MatMul(h, w5) }",
        zero=np.float32(0),
        six=np.float32(1.5),
        flat=np.array([-1, 8]),
    )
    for_deployment(model, recipe)
    assert layer_kernels(model, tmp_path / "optimized.onnx") == {
        "QLinearConv": 3,
        "QGemm": 1,
        "MatMulIntegerToFloat": 1,
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=["w8a8", "w8a8_symmetric", "w4a4", "w4a4_symmetric"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("mnist-conv", {"QLinearConv": 2, "QGemm": 1}),
        ("ppocr2-cls", {"QLinearConv": 53, "QGemm": 1}),
        ("minilm-l3", {"MatMulIntegerToFloat": 21, "QLinearMatMul": 3}),
    ],
)
def test_real_models_run_on_integer_kernels(
    real_model: Callable[[str], Path], tmp_path: Path, name: str, kernels: dict[str, int], recipe: Recipe
) -> None:
    model = load(real_model(name))
    normalize(model)
    fold_batch_norms(model)
    for_deployment(model, recipe)
    assert layer_kernels(model, tmp_path / "optimized.onnx") == kernels
