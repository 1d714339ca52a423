"""A small residual network for 28x28 grey images, as an exporter writes it before training-time folding.

    stem     Conv 3x3, BN, Relu
    stages   per width: blocks of Conv 3x3, BN, Relu, Conv 3x3, BN, added to the block's input, Relu; from
             the second stage on the first block halves the image, its shortcut is a Conv 1x1 with BN
    head     GlobalAveragePool, Flatten, Gemm

With the default widths about 175 thousand weights. They are initialized as He et al. (2015) do, batch norms
are the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

IMAGE = (1, 28, 28)
CLASSES = 10


def resnet(
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 2,
    batch: int | str = "N",
    seed: int = 0,
    stem_stride: int = 1,
) -> onnx.ModelProto:
    """The network at opset 18: images [batch, 1, 28, 28] float32 -> scores [batch, 10].

    Args:
        widths: channels of each stage.
        blocks: residual blocks in a stage.
        stem_stride: 2 halves the image in the first convolution.
    """
    builder = _Builder(np.random.default_rng(seed))
    x = builder.relu(builder.conv_bn("images", "stem", IMAGE[0], widths[0], stride=stem_stride))
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            x = builder.block(x, f"stage{stage + 1}.{block}", channels, width, stride)
            channels = width
    pooled = builder.node("GlobalAveragePool", [x], "pooled")
    features = builder.node("Flatten", [pooled], "features")
    weights = [builder.weight("head.weight", CLASSES, channels), builder.vector("head.bias", CLASSES, 0)]
    builder.node("Gemm", [features, *weights], "scores", transB=1)
    graph = helper.make_graph(
        builder.nodes,
        "resnet",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *IMAGE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in builder.initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Builder:
    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, NDArray[np.float32]] = {}

    def block(self, x: str, name: str, channels: int, width: int, stride: int) -> str:
        hidden = self.relu(self.conv_bn(x, f"{name}.1", channels, width, stride=stride))
        hidden = self.conv_bn(hidden, f"{name}.2", width, width)
        if stride != 1 or channels != width:
            x = self.conv_bn(x, f"{name}.shortcut", channels, width, kernel=1, stride=stride)
        return self.relu(self.node("Add", [hidden, x], f"{name}.sum"))

    def conv_bn(
        self, x: str, name: str, channels: int, width: int, *, kernel: int = 3, stride: int = 1
    ) -> str:
        weight = self.weight(f"{name}.weight", width, channels, kernel, kernel)
        geometry: dict[str, Any] = {
            "kernel_shape": [kernel] * 2,
            "strides": [stride] * 2,
            "pads": [kernel // 2] * 4,
        }
        convolved = self.node("Conv", [x, weight], f"{name}.conv", **geometry)
        statistics = [
            self.vector(f"{name}.bn.{part}", width, value)
            for part, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))
        ]
        return self.node("BatchNormalization", [convolved, *statistics], f"{name}.bn")

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], f"{x}.relu")

    def weight(self, name: str, *shape: int) -> str:
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        self.initializers[name] = (self._random.standard_normal(shape) * deviation).astype(np.float32)
        return name

    def vector(self, name: str, size: int, value: float) -> str:
        self.initializers[name] = np.full(size, value, np.float32)
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output
