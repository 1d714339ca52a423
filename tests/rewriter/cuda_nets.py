"""Float nets that together hold the operators of common CNNs and transformers, in the forms they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.rewriter.graphs import graph
from tests.rewriter.training import nets

CONV_NET = """g (float[{batch},4,{height},{width}] x) => (float[{batch},3] y)
    <float[3,{channels}] w, float[3] b> {{
        {body}
        p = GlobalAveragePool(f)
        v = Flatten(p)
        y = Gemm<transB=1>(v, w, b)
}}"""

POOLING = """m1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)
    m2 = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(m1)
    m3 = MaxPool<kernel_shape=[2,2], dilations=[2,1], pads=[1,0,1,1]>(m2)
    m4 = MaxPool<kernel_shape=[3,2], strides=[2,1], ceil_mode=1>(m3)
    a1 = AveragePool<kernel_shape=[2,2]>(m4)
    a2 = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a1)
    a3 = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(a2)
    a4 = AveragePool<kernel_shape=[3,2], pads=[1,0,1,1], strides=[2,1]>(a3)
    f = AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(a4)"""
CONVOLUTIONS = """c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<group=2, strides=[2,2], pads=[1,1,1,1]>(r1, w2)
    r2 = Clip(c2, zero, six)
    c3 = Conv<group=8, dilations=[2,2], pads=[2,2,2,2]>(r2, w3)
    c4 = Conv<pads=[0,1,2,1]>(c3, w4)
    f = Conv<group=8, pads=[0,0,1,1]>(c4, w5)"""
ACTIVATIONS = """c = Conv(x, w1, b1)
    a1 = HardSwish(c)
    a2 = LeakyRelu(a1)
    a3 = PRelu(a2, slope)
    a4 = Sigmoid(a3)
    a5 = Mul(a3, a4)
    a6 = Elu(a5)
    a7 = Softplus(a6)
    a8 = Mish(a7)
    a9 = Tanh(a8)
    a10 = HardSigmoid(a9)
    f = Selu(a10)"""
RESIDUAL = """c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    s2 = Add(r1, c2)
    r2 = Relu(s2)
    c3 = Conv<pads=[1,1,1,1]>(r2, w3)
    f = Add(c3, r2)"""
ATTENTION = """g (int64[batch,time] ids) => (float[batch,3] y)
    <float[20,8] table, float[8] g1, float[8] b1, float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8] bq,
     float[8] g2, float[8] b2, float[8,16] w1, float[16] c1, float[16,8] w2, float[8,3] w3, int64[4] heads,
     int64[3] merged, float root, float half, float one, float sqrt2, int64[1] axis> {
        e = Gather(table, ids)
        n = LayerNormalization(e, g1, b1)
        q0 = MatMul(n, wq)
        q1 = Add(q0, bq)
        q2 = Reshape(q1, heads)
        q = Transpose<perm=[0,2,1,3]>(q2)
        k1 = MatMul(n, wk)
        k2 = Reshape(k1, heads)
        k = Transpose<perm=[0,2,3,1]>(k2)
        v1 = MatMul(n, wv)
        v2 = Reshape(v1, heads)
        v = Transpose<perm=[0,2,1,3]>(v2)
        s1 = MatMul(q, k)
        s2 = Div(s1, root)
        s = Softmax(s2)
        o1 = MatMul(s, v)
        o2 = Transpose<perm=[0,2,1,3]>(o1)
        o = Reshape(o2, merged)
        r = Add(o, e)
        n2 = LayerNormalization(r, g2, b2)
        h0 = MatMul(n2, w1)
        h1 = Add(h0, c1)
        h2 = Div(h1, sqrt2)
        h3 = Erf(h2)
        h4 = Add(h3, one)
        h5 = Mul(h1, h4)
        h = Mul(h5, half)
        z = MatMul(h, w2)
        t = Add(z, r)
        m = ReduceMean<keepdims=0>(t, axis)
        y = MatMul(m, w3)
    }"""
HEADS = {
    "heads": np.array([0, 0, 2, 4]),
    "merged": np.array([0, 0, 8]),
    "axis": np.array([1]),
    "root": np.float32(2),
    "half": np.float32(0.5),
    "one": np.float32(1),
    "sqrt2": np.float32(np.sqrt(2)),
}


def net(body: str, weights: str, *, sizes: bool = True, channels: int = 4, **values: Any) -> ir.Model:
    """A convolutional net whose batch, and without `sizes` also height and width, are symbolic."""
    height, width = (20, 20) if sizes else ("height", "width")
    text = CONV_NET.format(batch="batch", height=height, width=width, channels=channels, body=body)
    return graph(text.replace("float[3] b>", f"float[3] b, {weights}>"), **values)


def normalized(sizes: bool = True) -> ir.Model:
    """Batch norm after a convolution, after a depthwise one, and where there is no layer before it."""
    weights = "float[4,4,3,3] w1, float[4,1,3,3] w2"
    lines, x = [], "x"
    for index, layer in enumerate(("", "Conv<pads=[1,1,1,1]>", "Conv<group=4, strides=[2,2]>")):
        if layer:
            lines.append(f"c{index} = {layer}({x}, w{index})")
            x = f"c{index}"
        parameters = ", ".join(f"{name}{index}" for name in ("gamma", "beta", "mean", "variance"))
        weights += "".join(f", float[4] {name}" for name in parameters.split(", "))
        lines.append(f"n{index} = BatchNormalization({x}, {parameters})")
        lines.append(f"{'f' if index == 2 else f'r{index}'} = Relu(n{index})")
        x = f"r{index}"
    variances = {f"variance{index}": np.array([0.5, 1, 1.5, 2], np.float32) for index in range(3)}
    return net("\n".join(lines), weights, sizes=sizes, **variances)


_POOLING_WEIGHTS = "float[4,4,1,1] w1"
_CONV_WEIGHTS = "float[8,4,3,3] w1, float[8] b1, float[8,4,3,3] w2, float[8,1,3,3] w3, float[8,8,3,3] w4"
_RESIDUAL_WEIGHTS = "float[4,4,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4,4,3,3] w3"
_BOUNDS = {"zero": np.float32(0), "six": np.float32(6)}

NETS: dict[str, Callable[[], ir.Model]] = {
    "mlp": nets.mlp,
    "small_resnet": nets.small_resnet,
    "residual": lambda: net(RESIDUAL, _RESIDUAL_WEIGHTS),
    "residual of any size": lambda: net(RESIDUAL, _RESIDUAL_WEIGHTS, sizes=False),
    "pooling": lambda: net(f"c = Conv(x, w1)\n{POOLING}", _POOLING_WEIGHTS),
    "pooling of any size": lambda: net(f"c = Conv(x, w1)\n{POOLING}", _POOLING_WEIGHTS, sizes=False),
    "convolutions": lambda: net(
        CONVOLUTIONS, f"{_CONV_WEIGHTS}, float[8,1,2,2] w5, float zero, float six", channels=8, **_BOUNDS
    ),
    "transposed convolutions": lambda: net(
        """c1 = ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>(x, w1, b1)
        r1 = Relu(c1)
        f = ConvTranspose<group=2, dilations=[2,2]>(r1, w2)""",
        "float[4,4,3,3] w1, float[4] b1, float[4,2,2,2] w2",
    ),
    "signals": lambda: graph(
        """g (float[batch,3,time] x) => (float[batch,2] y) <float[6,3,3] w1, float[6,1,3] w2, float[2,6] w> {
            c1 = Conv<pads=[1,1]>(x, w1)
            r1 = Relu(c1)
            c2 = Conv<group=6, strides=[2]>(r1, w2)
            m = MaxPool<kernel_shape=[2], strides=[2]>(c2)
            a = AveragePool<kernel_shape=[3], pads=[1,1]>(m)
            p = GlobalAveragePool(a)
            v = Flatten(p)
            y = Gemm<transB=1>(v, w)
        }"""
    ),
    "activations": lambda: net(ACTIVATIONS, "float[4,4,1,1] w1, float[4] b1, float[4,1,1] slope"),
    "normalized": normalized,
    "normalized of any size": lambda: normalized(sizes=False),
    "attention": lambda: graph(ATTENTION, **HEADS),
}
