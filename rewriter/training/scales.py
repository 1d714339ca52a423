"""How scales are trained: s = s0 * exp(p), with p trainable and 0 at first.

s cannot reach 0, a step of Adam changes every scale by the same few parts in a thousand, dL/dp = s * dL/ds
does not depend on the unit of the tensor, and weight decay pulls towards the calibrated scale.

Measured once (MLP, MNIST-5k, 2, 4 and 8 bits). AdamW: a linear s ends a little lower at 2 bits (training loss
0.113 against 0.129), alike at 4 and 8, but crosses 0 in some 4-bit runs. SGD at 2 bits: 0.156, against 0.168
for a linear s, 0.169 for p preconditioned by 1 / s0^2 (which makes NaN of near-empty channels) and 0.184 for
fixed scales; without LSQ's factor 1 / sqrt(N qmax), which is made for a linear s, 0.133.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from rewriter import inference
from rewriter.errors import ErrorCode, QatError
from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.training import layout
from rewriter.training.checkpoint import require_shape

FloatArray = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ScaleParameter:
    """How one scale is trained: "exp" is scale = initial scale * exp(parameter)."""

    parameter: str
    kind: Literal["exp"] = "exp"


@dataclasses.dataclass(frozen=True)
class TrainedScale:
    """The values around one trained scale in a graph.

    Attributes:
        scale: what the quantizers read; named like the initializer it replaces.
        initial: initializer with the calibrated scale, `{scale}.initial` where that name is free.
        parameter: initializer p, zeros, `{scale}.log_multiplier` likewise; float32, shape of the scale.
    """

    scale: ir.Value
    initial: ir.Value
    parameter: ir.Value


def trained_scales(
    parameters: Mapping[str, FloatArray], initial: Mapping[str, FloatArray], parameter_of: Mapping[str, str]
) -> dict[str, FloatArray]:
    """The scales that a checkpoint stands for, by scale name; float32, shape of the initial scale.

    Args:
        parameters: the checkpoint's parameters by name.
        initial: calibrated scales by scale name.
        parameter_of: scale name -> name of its parameter, for every trained scale.

    Raises:
        QatError: `checkpoint_invalid` when a parameter is missing or has another shape than its scale, or a
            scale is not a positive normal number.
    """
    if not parameter_of:
        return {}
    for name, parameter in parameter_of.items():
        require_shape(parameters, parameter, initial[name].shape)
    # onnxruntime's Exp, as in the trained graph: NumPy's may differ in the last bit, which moves values that
    # lie on a rounding boundary.
    model = _scales_model([(initial[name], parameters[p]) for name, p in parameter_of.items()])
    session = inference.open_session(model.SerializeToString())
    outputs = [value.name for value in model.graph.output]
    scales = dict(zip(parameter_of, inference.run(session, outputs, {}), strict=True))
    for name, scale in scales.items():
        if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
            raise QatError(
                ErrorCode.CHECKPOINT_INVALID,
                f"The trained parameter {parameter_of[name]!r} makes a scale that is 0 or not finite: "
                "training diverged. Use a smaller learning rate or an earlier checkpoint.",
                field=parameter_of[name],
            )
    return scales


def _scales_model(scales: Sequence[tuple[FloatArray, FloatArray]]) -> onnx.ModelProto:
    """Computes initial * exp(parameter) for each (initial, parameter), as one output each."""
    nodes, initializers, outputs = [], [], []
    for index, (initial, parameter) in enumerate(scales):
        scale, s0, p, multiplier = (f"{kind}_{index}" for kind in ("scale", "s0", "p", "multiplier"))
        nodes.append(helper.make_node("Exp", [p], [multiplier]))
        nodes.append(helper.make_node("Mul", [s0, multiplier], [scale]))
        initializers.append(numpy_helper.from_array(initial, s0))
        initializers.append(numpy_helper.from_array(parameter, p))
        outputs.append(helper.make_tensor_value_info(scale, onnx.TensorProto.FLOAT, initial.shape))
    graph = helper.make_graph(nodes, "scales", [], outputs, initializers)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=layout.NEWEST_IR_VERSION
    )


def parameterize(graph: ir.Graph, scales: Sequence[ir.Value]) -> list[TrainedScale]:
    """Replace each initializer in `scales` by s0 * exp(p), computed at the head of the graph."""
    first = next(iter(graph))
    names = FreeNames(graph)
    return [_parameterize(graph, scale, first, names) for scale in scales]


def _parameterize(graph: ir.Graph, scale: ir.Value, first: ir.Node, names: FreeNames) -> TrainedScale:
    name, tensor = scale.name, scale.const_value
    assert name is not None
    assert tensor is not None
    del graph.initializers[name]
    scale.const_value = None
    initial = add_initializer(graph, names.take(f"{name}.initial"), tensor.numpy())
    zeros = np.zeros(tensor.shape.numpy(), np.float32)
    parameter = add_initializer(graph, names.take(f"{name}.log_multiplier"), zeros)
    exponential = ir.node("Exp", [parameter], name=names.take(f"{parameter.name}/Exp"))
    product = ir.node("Mul", [initial, exponential.outputs[0]], name=names.take(f"{name}/Mul"))
    multiplier, trained = exponential.outputs[0], product.outputs[0]
    for value in (multiplier, trained):
        value.shape, value.type = initial.shape, initial.type
    multiplier.name = names.take(f"{name}.multiplier")
    scale.replace_all_uses_with(trained)
    scale.name, trained.name = None, name
    graph.insert_before(first, [exponential, product])
    return TrainedScale(trained, initial, parameter)
