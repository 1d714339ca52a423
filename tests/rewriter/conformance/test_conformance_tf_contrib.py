"""Our training graphs, run by onnxruntime-training, give the numbers that tf.contrib.quantize gave.

The cases are those of a file (`--conformance FILE`, default: the one beside this module, written by
TensorFlow 1.15.5). Every number must agree to a relative 1e-4, but for the allowances below; each says why.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter import fake_quantize
from rewriter.calibration import calibrate
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.gradients import differentiate
from rewriter.insertion import insert
from rewriter.lowering import lower
from rewriter.names import FreeNames
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.quantization import (
    NO_PLAN,
    IntegerRange,
    Plan,
    QuantizedTensor,
    Quantizer,
    QuantizerParameters,
)
from rewriter.recipe import GraphLoss, Override, Recipe
from rewriter.targets import TARGETS
from rewriter.training.artifacts import TrainingReport, write_training_artifacts
from rewriter.training.emitter import Emitter
from rewriter.training.runtime import training_api
from rewriter.training.tracked_ranges import scale_of_range, zero_point_of_range
from tests.rewriter.gradients.gradient_check import session

RELATIVE = 1e-4
# TensorFlow's moving average starts with a float32 1 - 0.999^1, which is off by 1.3e-5 of itself; part of
# RELATIVE. Numbers near 0 are compared to this share of the largest of their kind.
ABSOLUTE = 1e-5

Case = dict[str, Any]


@functools.cache
def cases(path: Path) -> Case:
    loaded: Case = json.loads(path.read_text())
    return loaded


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    file = cases(metafunc.config.getoption("--conformance"))
    for kind, found in (
        ("fake_quant", file["fake_quant"]),
        ("tracker", file["trackers"]),
        ("run", file["bn_conv_relu"]["runs"]),
    ):
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, found, ids=[_name(case) for case in found])


def _name(case: Case) -> str:
    settings = case.get("cfg", case)
    return ",".join(f"{key}={value}" for key, value in settings.items() if not isinstance(value, list))


def test_the_file_has_cases_of_every_kind(pytestconfig: pytest.Config) -> None:
    file = cases(pytestconfig.getoption("--conformance"))
    assert file["fake_quant"]
    assert file["trackers"]
    assert file["bn_conv_relu"]["runs"]


def integer_range(bits: int, *, narrow: bool, symmetric: bool = False) -> IntegerRange:
    """TensorFlow's [0 or 1, 2^bits - 1]; symmetric ones are signed here, which moves integers, not values."""
    if narrow:
        return IntegerRange.for_weights(bits, symmetric=symmetric)
    return IntegerRange.for_activations(bits, symmetric=symmetric)


# --- The fake-quant operator: y and dx, and the gradients of its range in ours. ---


def test_fake_quantization(fake_quant: Case) -> None:
    """The quantizer of a range (low, high) in the graph, forward and backward.

    TensorFlow gives the range gradients gmin and gmax, which its rewriter never used. Ours, of a range that
    is learned, are of scale and zero point: dz / (g s) = -(gmin + gmax), and what of ds comes from outside
    of the range is g (gmin (qmin - z) + gmax (qmax - z)).
    """
    range_ = integer_range(fake_quant["bits"], narrow=fake_quant["narrow"])
    x, gy = (np.array(fake_quant[key], np.float32).reshape(1, -1) for key in ("x", "gy"))
    low, high = (np.array(fake_quant[key], np.float32) for key in ("min", "max"))
    y, dx, ds, dz, s, z = _fake_quantize(x, gy, low, high, range_)
    expected, expected_dx = (np.array(fake_quant[key], np.float32).reshape(1, -1) for key in ("y", "gx"))

    if low == high == 0:
        # Allowance: an empty range. TensorFlow writes 0 and passes every gradient; our scale is at least
        # 1e-8, so that y is within 255 of these steps of 0, and only zeros pass gradients. A tracked range is
        # empty as long as all of the tensor is 0, where the two agree.
        assert np.abs(y).max() <= 255 * 1e-8
        return
    nmin, nmax = (range_.qmin - z) * s, (range_.qmax - z) * s
    steps = (np.clip(x, nmin, nmax).astype(np.float64) - nmin) / s
    # Allowance: one step at exact ties, which ONNX rounds to even and TensorFlow up.
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-3
    np.testing.assert_allclose(
        np.where(tie, expected, y), expected, rtol=RELATIVE, atol=ABSOLUTE * np.abs(expected).max()
    )
    assert (np.abs(y - expected)[tie] <= s * 1.001).all()
    # Allowance: elements on the edge of the range, which float32 puts on either side.
    edge = np.minimum(np.abs(x - nmin), np.abs(x - nmax)) < 1e-5 * max(abs(nmin), abs(nmax))
    np.testing.assert_array_equal(dx[~edge], expected_dx[~edge])

    # To a learned range belongs what rounds into it, half a step more than what TensorFlow clips at.
    inside = (x >= nmin - s / 2) & (x <= nmax + s / 2)
    clipped, below = expected_dx == 0, x < (nmin + nmax) / 2
    gmin = fake_quant["gmin"] - gy[inside & clipped & below].sum()
    gmax = fake_quant["gmax"] - gy[inside & clipped & ~below].sum()
    g = 1 / np.sqrt(x.size * range_.qmax)
    size = np.abs(gy).sum()
    np.testing.assert_allclose(-dz / (g * s), gmin + gmax, rtol=RELATIVE, atol=ABSOLUTE * size)
    rounding = (gy * (y.astype(np.float64) - x) / s)[inside].sum()
    ends = gmin * (range_.qmin - z) + gmax * (range_.qmax - z)
    np.testing.assert_allclose(
        ds / g - rounding, ends, rtol=RELATIVE, atol=10 * ABSOLUTE * size * range_.qmax
    )


def _fake_quantize(
    x: np.ndarray, gy: np.ndarray, low: np.ndarray, high: np.ndarray, range_: IntegerRange
) -> list[np.ndarray]:
    """y, dx, ds, dz, s and z, of a loss sum(gy y)."""
    inputs = [
        ir.val(name, ir.DataType.FLOAT, shape) for name, shape in (("x", x.shape), ("low", ()), ("high", ()))
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="quantizer")
    model = ir.Model(graph, ir_version=9)
    names = FreeNames(model)
    emit = Emitter(graph, names, "q")
    scale = scale_of_range(emit, inputs[1], inputs[2], range_, name="s")
    zero_point = zero_point_of_range(emit, inputs[1], scale, range_, name="z")
    outputs = []
    for tracked in (
        True,
        False,
    ):  # the gradients of scale and zero point are those of a range that is learned
        node = fake_quantize.make(inputs[0], scale, zero_point, range_, axis=None, name=f"fq{tracked}")
        node.outputs[0].name = f"y{tracked}"
        if tracked:
            fake_quantize.set_tracked(node)
        emit.insert(node)
        product = emit.op("Mul", node.outputs[0], emit.constant(gy), shape=x.shape)
        loss = emit.op("ReduceSum", product, shape=[], keepdims=0)
        if tracked:
            outputs += [node.outputs[0], *differentiate(graph, loss, [inputs[0]]).values()]
        else:
            outputs += differentiate(graph, loss, [scale, zero_point]).values()
    graph.outputs[:] = [*outputs, scale, zero_point]
    for output in graph.outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    lower(model, saturation="before")
    return session(ir.to_proto(model)).run(None, {"x": x, "low": low, "high": high})


# --- Trackers: ranges in the checkpoint, step by step. ---


def test_tracker(tracker: Case, tmp_path: Path) -> None:
    range_ = integer_range(tracker["bits"], narrow=tracker["narrow"], symmetric=tracker["symmetric"])
    x = np.array(tracker["seq"][0], np.float32)
    report = _tracked(x.size, range_, tracker, tmp_path)
    run = _Run(tmp_path)
    low, high = report.range_states["x"]
    for values, expected in zip(tracker["seq"], tracker["out"], strict=True):
        x = np.array(values, np.float32)
        run.step(x.reshape(1, -1))
        np.testing.assert_allclose(run.state(low), expected["min"], rtol=RELATIVE, atol=ABSOLUTE)
        np.testing.assert_allclose(run.state(high), expected["max"], rtol=RELATIVE, atol=ABSOLUTE)
        y = run.gradient("probe")[0]
        s = (expected["max"] - expected["min"]) / (range_.qmax - range_.qmin)
        _assert_equal_but_for_ties(y, np.array(expected["y"]), x, s)


def _tracked(size: int, range_: IntegerRange, case: Case, folder: Path) -> TrainingReport:
    """loss = sum(y probe), y the quantized x: the gradient of the parameter `probe` is y."""
    nodes = [
        helper.make_node("Mul", ["x", "probe"], ["products"], name="mul"),
        helper.make_node("ReduceSum", ["products"], ["loss"], name="sum", keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tracker",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.zeros((1, size), np.float32), "probe")],
        value_info=[helper.make_tensor_value_info("products", TensorProto.FLOAT, [1, size])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    quantizer = Quantizer(
        name="x",
        kind="weight" if case["kind"] == "last" else "activation",
        bits=case["bits"],
        range=range_,
        symmetric=case["symmetric"],
        axis=None,
        tensors=(QuantizedTensor("x", ("mul",)),),
        ranges="moving_average",
    )
    plan = Plan((quantizer,), (), ())
    zero_point = np.array(0 if case["symmetric"] else range_.qmin, range_.dtype)
    insert(model, plan, {"x": QuantizerParameters(np.array(1, np.float32), zero_point, "values")})
    return write_training_artifacts(model, Recipe(loss=GraphLoss(output="loss")), folder, plan=plan)


def _assert_equal_but_for_ties(y: np.ndarray, expected: np.ndarray, x: np.ndarray, s: float) -> None:
    """Allowance: one step at exact ties, which ONNX rounds to even and TensorFlow up."""
    difference = np.abs(y - expected)
    allowed = RELATIVE * np.abs(expected) + ABSOLUTE
    if s > 0:
        steps = x / s
        tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-2
        allowed = allowed + np.where(tie, s * 1.001, 0)
    assert (difference <= allowed).all(), (y, expected)


# --- Convolution, batch norm and Relu: eight training steps each, and an evaluation. ---

_STATE = {"c/BatchNorm/moving_mean": "bn.mean", "c/BatchNorm/moving_variance": "bn.var"}


def test_convolution_with_batch_norm(
    run: Case, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cases(pytestconfig.getoption("--conformance"))["bn_conv_relu"]
    if not run["cfg"].get("fused", True):
        # TensorFlow's unfused batch norm keeps the variance of the population, as our other targets do.
        policy = dataclasses.replace(TARGETS["tf_contrib"], bessel_correction=False)
        monkeypatch.setitem(TARGETS, "tf_contrib", policy)
    report, plan = _conv_bn_relu(file, run["cfg"], len(run["steps"][0]["x"]), tmp_path)
    weight, activation = _range_states(report, plan)
    trained = _Run(tmp_path)
    for number, step in enumerate(run["steps"], 1):
        x = np.array(step["x"], np.float32)[:, :, None, None]
        trained.step(x)
        out = trained.gradient("probe")
        expected = np.array(step["out"])
        s = _step_of(step["vars"], "c/act_quant", run["cfg"].get("ab", 8))
        quantized = not run["cfg"]["fold_only"] and number >= run["cfg"]["delay"]
        _assert_outputs(out[:, :, 0, 0], expected, s if quantized else 0.0)
        _assert_gradients(trained, step["grads"])
        for name, value in step["vars"].items():
            if name in _STATE:
                np.testing.assert_allclose(
                    trained.state(_STATE[name]), value, rtol=RELATIVE, atol=ABSOLUTE, err_msg=name
                )
            elif name == "fake_quantization_step":
                assert trained.state(report.step_counter) == value
            elif name.endswith("_quant/min"):
                states = weight if "weights" in name else activation
                low = trained.state(states[0]) if len(states) == 2 else 0.0  # never negative behind a Relu
                np.testing.assert_allclose(low, value, rtol=RELATIVE, atol=ABSOLUTE, err_msg=name)
            elif name.endswith("_quant/max"):
                states = weight if "weights" in name else activation
                np.testing.assert_allclose(
                    trained.state(states[-1]), value, rtol=RELATIVE, atol=ABSOLUTE, err_msg=name
                )
            elif name.endswith("max/biased"):
                np.testing.assert_allclose(
                    trained.state(f"{activation[-1]}.sum"), value, rtol=RELATIVE, atol=ABSOLUTE
                )
    if run.get("eval") is not None:
        x = np.array(run["eval"]["x"], np.float32)[:, :, None, None]
        s = _step_of(run["steps"][-1]["vars"], "c/act_quant", run["cfg"].get("ab", 8))
        _assert_outputs(trained.evaluate(x)[:, :, 0, 0], np.array(run["eval"]["out"]), s)


def _step_of(variables: Case, name: str, bits: int) -> float:
    return variables[f"{name}/max"] / (2**bits - 1) if f"{name}/max" in variables else 0.0


def _assert_outputs(out: np.ndarray, expected: np.ndarray, s: float) -> None:
    """Allowance, where the output is quantized: one step, for at most one element in ten. The float value
    before the activation quantizer differs in the last bits, and where it lies on a rounding boundary the
    quantized one differs by a step."""
    difference = np.abs(out - expected)
    off = difference > RELATIVE * np.abs(expected) + ABSOLUTE
    assert off.mean() <= (0.1 if s else 0.0), (out, expected)
    assert (difference[off] <= s * 1.01).all(), (out, expected)


def _assert_gradients(trained: _Run, grads: Case) -> None:
    ours = {
        "c/weights": trained.gradient("W").transpose(2, 3, 1, 0),
        "c/BatchNorm/gamma": trained.gradient("bn.gamma"),
        "c/BatchNorm/beta": trained.gradient("bn.beta"),
        "x": trained.gradient("x_probe").transpose(0, 2, 3, 1),
    }
    for name, value in grads.items():
        expected = np.array(value)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            ours[name].reshape(expected.shape), expected, rtol=RELATIVE, atol=RELATIVE * scale, err_msg=name
        )


def _range_states(report: TrainingReport, plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    states = {q.kind: report.range_states[q.name] for q in plan.quantizers}
    return states.get("weight", ()), states.get("activation", ())


def _conv_bn_relu(file: Case, settings: Case, batch: int, folder: Path) -> tuple[TrainingReport, Plan]:
    """loss = sum(out G + out probe): the gradient of `probe` is out, that of `x_probe` is the gradient of
    x."""
    weights = np.array(file["W"], np.float32)
    channels = weights.shape[1]
    out_gradient = np.linspace(-1, 1, batch * channels, dtype=np.float32).reshape(batch, channels, 1, 1)
    initializers = {
        "W": np.ascontiguousarray(weights.T)[:, :, None, None],
        "bn.gamma": np.array(file["gamma"], np.float32),
        "bn.beta": np.array(file["beta"], np.float32),
        "bn.mean": np.zeros(channels, np.float32),
        "bn.var": np.ones(channels, np.float32),
        "x_probe": np.zeros((batch, weights.shape[0], 1, 1), np.float32),
        "probe": np.zeros_like(out_gradient),
        "G": out_gradient,
    }
    nodes = [
        helper.make_node("Add", ["x", "x_probe"], ["probed_x"], name="probe/x"),
        helper.make_node("Conv", ["probed_x", "W"], ["u"], name="c/conv", kernel_shape=[1, 1]),
        helper.make_node(
            "BatchNormalization",
            ["u", "bn.gamma", "bn.beta", "bn.mean", "bn.var"],
            ["n"],
            name="c/bn",
            epsilon=file["bn_eps"],
            momentum=file["bn_decay"],
        ),
        helper.make_node("Relu", ["n"], ["out"], name="c/relu"),
        helper.make_node("Mul", ["out", "G"], ["products"], name="probe/products"),
        helper.make_node("Mul", ["out", "probe"], ["probed"], name="probe/probed"),
        helper.make_node("Add", ["products", "probed"], ["all_products"], name="probe/all"),
        helper.make_node("ReduceSum", ["all_products"], ["loss"], name="probe/loss", keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "conv_bn_relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, weights.shape[0], 1, 1])],
        [
            helper.make_tensor_value_info("loss", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, channels, 1, 1]),
        ],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    normalize(model)
    recipe = Recipe(
        target="tf_contrib",
        ranges="moving_average",
        per_channel=False,
        weight_bits=settings.get("wb", 8),
        activation_bits=settings.get("ab", 8),
        quant_delay=settings["delay"],
        freeze_bn_delay=settings["freeze"],
        loss=GraphLoss(output="loss"),
        overrides=(Override(match="probe", quantize=False),),
    )
    folding = fold_batch_norms(model, recipe)
    plan = NO_PLAN
    if not settings["fold_only"]:
        plan = place(model, recipe)
        insert(model, plan, calibrate(model, plan, recipe, None))
    return write_training_artifacts(model, recipe, folder, plan=plan, folding=folding), plan


class _Run:
    """Steps of the training model by the stock API, without an optimizer."""

    def __init__(self, folder: Path) -> None:
        api = training_api()
        self._state = api.CheckpointState.load_checkpoint(folder / "checkpoint")
        self._module = api.Module(folder / "training_model.onnx", self._state, folder / "eval_model.onnx")

    def step(self, *feeds: np.ndarray) -> None:
        self._module.train()
        self._module(*feeds)
        self._module.lazy_reset_grad()

    def gradient(self, name: str) -> np.ndarray:
        return np.array(self._state.parameters[name].grad)

    def state(self, name: str) -> np.ndarray:
        return np.array(self._state.parameters[name].data)

    def evaluate(self, *feeds: np.ndarray) -> np.ndarray:
        self._module.eval()
        outputs: np.ndarray = np.array(self._module(*feeds)[1])
        return outputs
