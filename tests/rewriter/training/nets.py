"""Small models for the tests of the training side, as `insert` leaves them: opset 18, FakeQuantize nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from rewriter import fake_quantize
from rewriter.quantization import IntegerRange

FEATURES, HIDDEN, CLASSES = 10, 8, 4


def model(
    nodes: Sequence[object],
    initializers: Mapping[str, np.ndarray],
    outputs: Mapping[str, Sequence[object]],
    inputs: Mapping[str, Sequence[object]] | None = None,
) -> ir.Model:
    """A float32 model of opset 18 from `onnx.helper` nodes; the shapes of its values are inferred."""
    import onnx

    inputs = inputs or {"x": ["N", FEATURES]}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def node(op_type: str, inputs: Sequence[str], output: str, **attributes: object) -> object:
    return helper.make_node(op_type, inputs, [output], name=f"node_{output}", **attributes)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "W1": (rng.standard_normal((FEATURES, HIDDEN)) * 0.4).astype(np.float32),
        "b1": (rng.standard_normal(HIDDEN) * 0.1).astype(np.float32),
        "W2": (rng.standard_normal((HIDDEN, CLASSES)) * 0.4).astype(np.float32),
        "b2": (rng.standard_normal(CLASSES) * 0.1).astype(np.float32),
    }


def mlp() -> ir.Model:
    """y = relu(x W1 + b1) W2 + b2; x [N, 10], y [N, 4]."""
    nodes = [
        node("Gemm", ["x", "W1", "b1"], "h"),
        node("Relu", ["h"], "r"),
        node("Gemm", ["r", "W2", "b2"], "y"),
    ]
    return model(nodes, weights(), {"y": ["N", CLASSES]})


def batch_norm_mlp() -> ir.Model:
    """`mlp` with a batch norm in place of the first bias."""
    rng = np.random.default_rng(2)
    initializers = {name: value for name, value in weights().items() if name != "b1"} | {
        "gamma": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
        "beta": (rng.standard_normal(HIDDEN) * 0.1).astype(np.float32),
        "mean": (rng.standard_normal(HIDDEN) * 0.1).astype(np.float32),
        "variance": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
    }
    nodes = [
        node("Gemm", ["x", "W1"], "h"),
        node("BatchNormalization", ["h", "gamma", "beta", "mean", "variance"], "n"),
        node("Relu", ["n"], "r"),
        node("Gemm", ["r", "W2", "b2"], "y"),
    ]
    return model(nodes, initializers, {"y": ["N", CLASSES]})


def quantized_mlp(bits: int = 4) -> ir.Model:
    """`mlp` with x and r quantized per tensor, unsigned, and W1, W2 per output channel."""
    net = mlp()
    for name, scale, zero_point in (
        ("x", 5.0 / (2**bits - 1), 2 ** (bits - 1)),
        ("r", 2.5 / (2**bits - 1), 0),
    ):
        quantize(
            net, name, IntegerRange.for_activations(bits, symmetric=False), np.float32(scale), zero_point
        )
    for name in ("W1", "W2"):
        range_ = IntegerRange.for_weights(bits)
        scale = 0.8 * np.abs(net.graph.initializers[name].const_value.numpy()).max(0) / range_.qmax
        quantize(net, name, range_, scale.astype(np.float32), 0, axis=1)
    return net


def quantize(
    net: ir.Model,
    name: str,
    range_: IntegerRange,
    scale: np.ndarray,
    zero_point: int,
    axis: int | None = None,
) -> None:
    """Put a FakeQuantize on a value; all its readers read the quantized one."""
    graph = net.graph
    values = [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
    x = next(value for value in values if value.name == name)
    readers, parameters = list(x.uses()), []
    for suffix, array in (
        ("scale", np.asarray(scale, np.float32)),
        ("zero_point", np.full(np.shape(scale), zero_point, range_.dtype)),
    ):
        value = ir.val(f"{name}_{suffix}", const_value=ir.tensor(array, name=f"{name}_{suffix}"))
        graph.register_initializer(value)
        parameters.append(value)
    quantizer = fake_quantize.make(x, *parameters, range_, axis=axis, name=f"{name}_fake_quantize")
    producer = x.producer()
    if producer is None:
        graph.insert_before(graph[0], quantizer)
    else:
        graph.insert_after(producer, quantizer)
    for use in readers:
        use.node.replace_input_with(use.idx, quantizer.outputs[0])


def batch(count: int = 32, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Samples of four separable classes: x [count, 10] float32, labels [count] int64."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    x = rng.standard_normal((count, FEATURES)) * 0.5
    x[np.arange(count), labels] += 1.5
    return x.astype(np.float32), labels.astype(np.int64)


def small_resnet() -> ir.Model:
    """Convolutions around a residual addition, a strided depthwise one, a classifier; x [N, 3, 8, 8]."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    initializers = {
        "stem.weight": weight(6, 3, 3, 3),
        "stem.bias": weight(6, 1).reshape(-1),
        "block.1.weight": weight(6, 6, 3, 3),
        "block.1.bias": weight(6, 1).reshape(-1),
        "block.2.weight": weight(6, 6, 3, 3),
        "depthwise.weight": weight(6, 1, 3, 3),
        "depthwise.bias": weight(6, 1).reshape(-1),
        "head.weight": weight(CLASSES, 6),
        "head.bias": weight(CLASSES, 1).reshape(-1),
    }
    pads = [1, 1, 1, 1]
    nodes = [
        node("Conv", ["x", "stem.weight", "stem.bias"], "stem", pads=pads),
        node("Relu", ["stem"], "stem_relu"),
        node("MaxPool", ["stem_relu"], "pooled", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["pooled", "block.1.weight", "block.1.bias"], "c1", pads=pads),
        node("Relu", ["c1"], "r1"),
        node("Conv", ["r1", "block.2.weight"], "c2", pads=pads),
        node("Add", ["c2", "pooled"], "sum"),
        node("Relu", ["sum"], "r2"),
        node("Conv", ["r2", "depthwise.weight", "depthwise.bias"], "c3", pads=pads, strides=[2, 2], group=6),
        node("GlobalAveragePool", ["c3"], "gap"),
        node("Flatten", ["gap"], "flat"),
        node("Gemm", ["flat", "head.weight", "head.bias"], "y", transB=1),
    ]
    return model(nodes, initializers, {"y": ["N", CLASSES]}, inputs={"x": ["N", 3, 8, 8]})
