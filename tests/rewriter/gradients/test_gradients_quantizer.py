"""The gradient of FakeQuantize equals LSQ's formulas, written out in float64 NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from gradient_check import session

from rewriter import fake_quantize
from rewriter.gradients import differentiate, trainability
from rewriter.quantization import IntegerRange, dequantize, quantize
from rewriter.recipe import TrainingDevice

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One quantizer and its data; the scale leaves about a fifth of the elements out of range."""

    x: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    range: IntegerRange
    axis: int | None
    dy: np.ndarray

    @property
    def along(self) -> tuple[int, ...]:
        """The shape that puts a per-channel parameter beside x."""
        if self.axis is None:
            return ()
        axis = self.axis % self.x.ndim
        return tuple(-1 if i == axis else 1 for i in range(self.x.ndim))

    def reference(self, *, per_sample: bool) -> tuple[np.ndarray, np.ndarray]:
        """dx and ds of LSQ, with N per sample or over the whole tensor."""
        x, dy = self.x.astype(np.float64), self.dy.astype(np.float64)
        s = self.scale.astype(np.float64).reshape(self.along)
        z = self.zero_point.astype(np.float64).reshape(self.along)
        unclipped = np.rint(x / s) + z
        inside = (unclipped >= self.range.qmin) & (unclipped <= self.range.qmax)
        y = (np.clip(unclipped, self.range.qmin, self.range.qmax) - z) * s
        slope = np.where(inside, (y - x) / s, y / s)
        axis = None if self.axis is None else self.axis % x.ndim
        summed = tuple(i for i in range(x.ndim) if i != axis)
        shared = [i for i in summed if not (per_sample and i == 0)]
        g = 1 / np.sqrt(np.prod([x.shape[i] for i in shared]) * self.range.qmax)
        return np.where(inside, dy, 0), g * (dy * slope).sum(axis=summed if axis is not None else None)


def quantized(
    shape: tuple[int, ...], range_: IntegerRange, *, axis: int | None = None, seed: int = 0
) -> Quantized:
    rng = np.random.default_rng(seed)
    channels = () if axis is None else (shape[axis],)
    # |x| < 1.25 of the range on the wider side.
    scale = np.asarray(2.4 / (range_.qmax - range_.qmin) * (0.8 + 0.4 * rng.random(channels)), np.float32)
    if range_.qmin < 0:
        zero_point = np.zeros(channels, range_.dtype)
    else:
        zero_point = np.asarray(rng.integers(0, range_.qmax + 1, channels), range_.dtype)
    x = rng.standard_normal(shape).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    return Quantized(x, scale, zero_point, range_, axis, dy)


def gradients(
    case: Quantized,
    *,
    weight: bool,
    dims: list[int | str] | None = None,
    rankless: bool = False,
    wanted: tuple[str, ...] = ("x", "scale"),
    on_grid: bool = False,
    feed_zero_point: bool = False,
    device: TrainingDevice = "any",
) -> tuple[dict[str, np.ndarray], ir.Graph]:
    """The gradients that onnxruntime computes, and the graph they were computed by.

    The graph is y = FakeQuantize(x), loss = sum(y * r), with an initializer x or one computed from data; to
    run it, y is fed, and x / scale where it is read, as NumPy computes them.
    """
    data = ir.val("data", ir.DataType.FLOAT, None)
    forward = ir.node("Identity", [data], name="forward")
    x = ir.val("x", ir.DataType.FLOAT, case.x.shape) if weight else forward.outputs[0]
    x.name, x.type = "x", ir.TensorType(ir.DataType.FLOAT)
    x.shape = None if rankless else ir.Shape(dims or case.x.shape)
    scale = ir.val("scale", const_value=ir.tensor(case.scale, name="scale"))
    zero_point = ir.val("zero_point", const_value=ir.tensor(case.zero_point, name="zero_point"))
    if weight:
        x.const_value = ir.tensor(case.x, name="x")
    if feed_zero_point:
        zero_point.const_value = None
    r = ir.val("r", ir.DataType.FLOAT, None)
    node = fake_quantize.make(x, scale, zero_point, case.range, axis=case.axis, on_grid=on_grid, name="fq")
    product = ir.node("Mul", [node.outputs[0], r], name="product")
    total = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 0}, name="total")
    loss = total.outputs[0]
    initializers = [value for value in (x, scale, zero_point) if value.const_value is not None]
    inputs = [zero_point] if feed_zero_point else []
    graph = ir.Graph(
        [data, *inputs, r],
        [],
        nodes=[forward, node, product, total],
        initializers=initializers,
        opset_imports={"": 18, "qat": 1},
        name="g",
    )
    by_name = {"x": x, "scale": scale}
    found = differentiate(graph, loss, [by_name[name] for name in wanted], device=device)
    for output, name in zip(node.outputs, ("y", "steps"), strict=False):
        fed = ir.val(name, ir.DataType.FLOAT, None)
        output.replace_all_uses_with(fed)
        graph.inputs.append(fed)
    graph.remove(node)
    for name in wanted:
        found[by_name[name]].name = f"d{name}"
        graph.outputs.append(found[by_name[name]])
    q = quantize(case.x, case.scale, case.zero_point, case.range, case.axis)
    y_fed = dequantize(q, case.scale, case.zero_point, case.axis)
    feeds = {"r": case.dy, "y": y_fed, "steps": case.x / case.scale.reshape(case.along), "data": case.x}
    if feed_zero_point:
        feeds["zero_point"] = case.zero_point
    runner = session(ir.to_proto(ir.Model(graph, ir_version=9)))
    read = {value.name for value in runner.get_inputs()}
    outputs = runner.run(None, {name: array for name, array in feeds.items() if name in read})
    return dict(zip(wanted, outputs, strict=True)), graph


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


RANGES = {
    "weight": IntegerRange.for_weights,
    "symmetric": lambda bits: IntegerRange.for_activations(bits, symmetric=True),
    "asymmetric": lambda bits: IntegerRange.for_activations(bits, symmetric=False),
}


@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1])
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("device", ["any", "cpu"])
def test_gradients_equal_the_float64_reference(
    bits: int, kind: str, axis: int | None, device: TrainingDevice
) -> None:
    case = quantized((8, 6, 5, 7), RANGES[kind](bits), axis=axis, seed=bits)
    dx, ds = case.reference(per_sample=kind != "weight")
    assert 0 < np.count_nonzero(dx) < dx.size
    result, _ = gradients(case, weight=kind == "weight", device=device)
    assert_close(result["x"], dx)
    assert_close(result["scale"], ds)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dims", [["N", 6, 5], ["N", "C", "L"]], ids=["batch", "all"])
def test_n_is_counted_at_run_time_where_the_shape_is_symbolic(
    dims: list[int | str], axis: int | None
) -> None:
    case = quantized((8, 6, 5), RANGES["asymmetric"](8), axis=axis)
    dx, ds = case.reference(per_sample=True)
    result, _ = gradients(case, weight=False, dims=dims)
    assert_close(result["x"], dx)
    assert_close(result["scale"], ds)


def test_per_tensor_needs_no_rank() -> None:
    case = quantized((8, 6, 5), RANGES["symmetric"](8))
    result, _ = gradients(case, weight=False, rankless=True)
    assert_close(result["scale"], case.reference(per_sample=True)[1])


def test_weight_of_an_existing_wide_quantizer_counts_all_elements() -> None:
    case = quantized((8, 6, 5), RANGES["symmetric"](8), axis=0)
    result, _ = gradients(case, weight=True)
    assert_close(result["scale"], case.reference(per_sample=False)[1])


def test_weight_computed_from_the_batch_counts_all_elements() -> None:
    """A weight that batch norm was folded into, with statistics that the graph updates."""
    case = quantized((8, 6, 5), RANGES["weight"](8), axis=0)
    result, _ = gradients(case, weight=False)
    assert_close(result["scale"], case.reference(per_sample=False)[1])


@pytest.mark.parametrize("axis", [None, 1])
def test_zero_point_may_be_fed(axis: int | None) -> None:
    case = quantized((4, 3, 5), RANGES["asymmetric"](8), axis=axis)
    result, _ = gradients(case, weight=False, feed_zero_point=True)
    dx, ds = case.reference(per_sample=True)
    assert_close(result["x"], dx)
    assert_close(result["scale"], ds)


@pytest.mark.parametrize("device", ["any", "cpu"])
def test_large_activation_keeps_the_accuracy(device: TrainingDevice) -> None:
    case = quantized((16, 32, 28, 28), RANGES["asymmetric"](8))
    result, _ = gradients(case, weight=False, device=device)
    assert_close(result["scale"], case.reference(per_sample=True)[1])


def test_only_what_is_wanted_is_computed() -> None:
    case = quantized((4, 3), RANGES["symmetric"](8))
    dx, ds = case.reference(per_sample=True)
    only_x, graph = gradients(case, weight=False, wanted=("x",))
    assert_close(only_x["x"], dx)
    operators = [node.op_type for node in graph]
    assert operators.count("FakeQuantGrad") == 1
    assert not {"Sub", "FusedMatMul"} & set(operators)
    only_scale, graph = gradients(case, weight=False, wanted=("scale",))
    assert_close(only_scale["scale"], ds)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_range_of_a_weight_ends_where_its_integers_do(bits: int, axis: int) -> None:
    """To one float32; the end itself rounds to the even integer, which is outside."""
    range_ = IntegerRange.for_weights(bits)
    end = np.float32(range_.qmax + 0.5)
    below, above = (np.nextafter(end, np.float32(limit)) for limit in (0, np.inf))
    x = np.array([[below, end], [above, -below], [-end, -above], [0, 1e30]], np.float32)
    channels = x.shape[axis]
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.int8)
    case = Quantized(x, ones, zeros, range_, axis, np.ones_like(x))
    result, _ = gradients(case, weight=True)
    np.testing.assert_array_equal(result["x"], [[1, 0], [0, 1], [0, 0], [1, 0]])


def test_on_grid_quantizer_passes_the_gradient_and_has_none_for_its_scale() -> None:
    case = quantized((4, 3), RANGES["symmetric"](8))
    result, _ = gradients(case, weight=False, wanted=("x",), on_grid=True)
    np.testing.assert_array_equal(result["x"], case.dy)

    x, scale = ir.val("x", ir.DataType.FLOAT, [4, 3]), ir.val("s", ir.DataType.FLOAT, [])
    zero_point = ir.val("z", ir.DataType.INT8, [])
    node = fake_quantize.make(x, scale, zero_point, case.range, axis=None, on_grid=True, name="fq")
    total = ir.node("ReduceSum", node.outputs, {"keepdims": 0}, name="total")
    graph = ir.Graph([x, scale, zero_point], total.outputs, nodes=[node, total], opset_imports={"": 18})
    decided = trainability(graph, total.outputs[0], [x, scale, zero_point])
    assert decided.trainable == ("x",)
    assert set(decided.frozen) == {"s", "z"}


def test_a_rounded_bias_passes_the_gradient_and_has_none_for_its_scales() -> None:
    bias, x_scale, weight_scale, r = (
        ir.val(name, ir.DataType.FLOAT, shape)
        for name, shape in (("bias", [3]), ("x_scale", []), ("weight_scale", [3]), ("r", [3]))
    )
    node = fake_quantize.make_bias(bias, x_scale, weight_scale, name="fqb")
    product = ir.node("Mul", [node.outputs[0], r], name="product")
    total = ir.node("ReduceSum", product.outputs, {"keepdims": 0}, name="total")
    inputs = [bias, x_scale, weight_scale, r]
    graph = ir.Graph(inputs, [], nodes=[node, product, total], opset_imports={"": 18, "qat": 1}, name="g")
    decided = trainability(graph, total.outputs[0], inputs[:3])
    assert decided.trainable == ("bias",)
    assert set(decided.frozen) == {"x_scale", "weight_scale"}
    gradient = differentiate(graph, total.outputs[0], [bias])[bias]
    node.outputs[0].replace_all_uses_with(bias)  # the forward value, which the gradient does not depend on
    graph.remove(node)
    graph.outputs.append(gradient)
    (found,) = session(ir.to_proto(ir.Model(graph, ir_version=9))).run(
        None, {value.name: np.array([1, -2, 3], np.float32) for value in graph.inputs}
    )
    np.testing.assert_array_equal(found, [1, -2, 3])


@pytest.mark.parametrize("also_in_float", [False, True], ids=["alone", "with_a_float_consumer"])
@pytest.mark.parametrize("zero_point", [0, 100])
@pytest.mark.parametrize("device", ["any", "cpu"])
def test_quantizer_behind_relu_and_the_relu_share_a_mask(
    zero_point: int, also_in_float: bool, device: TrainingDevice
) -> None:
    rng = np.random.default_rng(0)
    shape = (4, 3, 5, 6)
    data, r = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    x, range_ = np.maximum(data, 0), IntegerRange.for_activations(8, symmetric=False)
    scale, z = np.float32(1.5 / (255 - zero_point)), np.array(zero_point, np.uint8)
    y = dequantize(quantize(x, scale, z, range_, None), scale, z, None)
    case = Quantized(x, scale, z, range_, None, r)
    dx, ds = case.reference(per_sample=True)
    assert 0 < np.count_nonzero(x > 1.5) < np.count_nonzero(x)

    # The parameter is added to the data: else the quantizer would be a weight's.
    values = {name: ir.val(name, ir.DataType.FLOAT, shape) for name in ("data", "parameter", "r")}
    add = ir.node("Add", [values["data"], values["parameter"]], name="add")
    s = ir.val("scale", const_value=ir.tensor(scale, name="scale"))
    z_value = ir.val("zero_point", const_value=ir.tensor(z, name="zero_point"))
    relu = ir.node("Relu", add.outputs, name="relu")
    node = fake_quantize.make(relu.outputs[0], s, z_value, range_, axis=None, name="fq")
    nodes = [add, relu, node, ir.node("Mul", [node.outputs[0], values["r"]], name="product")]
    if also_in_float:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], relu.outputs[0]], name="sum"))
    for made in nodes:
        made.outputs[0].shape, made.outputs[0].type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    nodes.append(ir.node("ReduceSum", [nodes[-1].outputs[0]], {"keepdims": 0}, name="total"))
    loss = nodes[-1].outputs[0]
    graph = ir.Graph(
        list(values.values()),
        [],
        nodes=nodes,
        initializers=[s, z_value],
        opset_imports={"": 18, "qat": 1},
        name="g",
    )
    found = differentiate(graph, loss, [values["parameter"], s], device=device)
    fed = ir.val("y", ir.DataType.FLOAT, shape)
    node.outputs[0].replace_all_uses_with(fed)
    graph.remove(node)
    graph.inputs.append(fed)
    graph.outputs.extend(found.values())
    feeds = {"data": data, "parameter": np.zeros(shape, np.float32), "r": r, "y": y}
    dparameter, dscale = session(ir.to_proto(ir.Model(graph, ir_version=9))).run(None, feeds)
    assert_close(dparameter, np.where(data > 0, dx + also_in_float, 0))
    assert_close(dscale, ds)
    masks = sum(node.op_type == ("HardSigmoid" if device == "cpu" else "FakeQuantGrad") for node in graph)
    assert masks == 1 + also_in_float, "the Relu masks only what reaches it past the quantizer"
