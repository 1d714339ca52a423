"""Batch normalization in the training graph, folded into the layer before it or on its own.

Folded (Jacob et al. 2018; Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2; tf.contrib.quantize), with
the running statistics m, v as they were before the step, sigma = sqrt(v + epsilon), FQ the weight's
quantizer and layer() without a bias:

    z = layer(x, FQ(W * gamma / sigma))
    before the freeze    y = a z + beta - a mean        a = sigma / sigma_B
    after the freeze     y = z + FQ(beta - gamma m / sigma), the bias of inference

sigma_B and mean come from the statistics of the batch, and gradients flow through these. What they are taken
of is the recipe's choice (`fold_statistics`):

    float_layer       u = layer(x, W), as tf.contrib.quantize does it, at the price of a second layer:
                      sigma_B^2 = var(u) + epsilon, a mean = gamma mean(u) / sigma_B
    quantized_layer   z itself, whose channels are k = gamma / sigma times those of u but for the rounding:
                      sigma_B^2 = var(z) / k^2 + epsilon, mean = mean(z)

With nothing quantized both are ordinary batch normalization before the freeze, and inference batch
normalization after it. Where gamma is 0, z says nothing of u, and the running statistics stand in: the
gradient of that gamma is then batch normalization's but for the ratio of the deviations.

    m = momentum m + (1 - momentum) mean(u)        v likewise, until the freeze

With the quantized layer these are the statistics of z / k, rounding included: what the deployed layer will
have, not those of the float one. A channel that rounds to 0 keeps the running statistics it has.

v takes the variance of the population, as ONNX's BatchNormalization has it; for target tf_contrib it takes
n / (n - 1) times that, as TensorFlow's fused kernel.

A batch norm that stays one is y = a x + b with a = gamma / sqrt(v + epsilon), b = beta - a m, of the
statistics of the batch before and the running ones after the freeze.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from rewriter.channel_operators import AFFINE, NORMALIZE, STATISTICS, all_but_channels
from rewriter.fake_quantize import DOMAIN
from rewriter.fold.report import TrainedBatchNorm
from rewriter.names import FreeNames
from rewriter.operators import traits_of
from rewriter.recipe import FoldStatistics
from rewriter.training.emitter import Emitter
from rewriter.training.state import Gates, States
from rewriter.training.unfolding import BatchNormValues, Unfolded

_SMALLEST_FACTOR: Final = 1e-12


@dataclasses.dataclass(frozen=True)
class BatchNormTraining:
    """How batch norms behave in training.

    Attributes:
        statistics: of which layer's result.
        bessel_correction: whether the running variance takes n / (n - 1) times the batch's variance.
    """

    statistics: FoldStatistics
    bessel_correction: bool


class TrainingBatchNorms:
    """Turns the inference form of batch norms in a graph into their training form."""

    def __init__(
        self, graph: ir.Graph, names: FreeNames, states: States, gates: Gates, training: BatchNormTraining
    ) -> None:
        self._graph = graph
        self._names = names
        self._states = states
        self._gates = gates
        self._training = training
        self._nodes: Mapping[str, ir.Node] = {node.name or "": node for node in graph}

    def normalize_layer(self, unfolded: Unfolded) -> None:
        """The layer's result is normalized with the statistics of the batch until the freeze."""
        fold, values = unfolded.fold, unfolded.values
        if _is_frozen_at_once(fold.freeze_bn_delay):
            return
        layer = self._nodes[unfolded.folded.layer]
        z, shape = layer.outputs[0], values.gamma.shape
        adder = layer if fold.add is None else self._nodes[fold.add]
        readers = _Readers.of(adder.outputs[0])
        bias = _take_bias(layer, unfolded.bias) if fold.add is None else unfolded.bias
        emit = Emitter(self._graph, self._names, unfolded.folded.batch_norm, layer)
        frozen = self._frozen(fold.freeze_bn_delay)
        if self._training.statistics == "quantized_layer" and frozen is None:
            y, mean, variance = _normalized(emit, z, values, fold.epsilon)
        else:
            a, b, mean, variance = self._batch_affine(emit, layer, unfolded)
            if frozen is not None:
                if bias.shape != shape:
                    bias = emit.op("Reshape", bias, emit.constant([-1], np.int64), shape=shape)
                a = emit.op("Where", frozen, emit.constant(1.0), a, shape=shape)
                b = emit.op("Where", frozen, bias, b, shape=shape)
            y = emit.op(AFFINE, z, a, b, shape=z.shape, domain=DOMAIN)
        readers.read(y, self._names)
        self._update(emit, (values.mean, values.variance), z, mean, variance, fold.momentum, frozen)

    def _batch_affine(
        self, emit: Emitter, layer: ir.Node, unfolded: Unfolded
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """What the batch makes of z before the freeze, a z + b, and mean and variance of u."""
        fold, values, z = unfolded.fold, unfolded.values, layer.outputs[0]
        shape, epsilon = values.gamma.shape, emit.constant(fold.epsilon)
        if self._training.statistics == "float_layer":
            u = _float_layer(emit, layer, fold.weight_index, unfolded.original)
            mean, variance = _statistics(emit, u, shape)
            deviation = emit.op("Sqrt", emit.op("Add", variance, epsilon, shape=shape), shape=shape)
            a = emit.op("Div", values.deviation, deviation, shape=shape)
            normalized = emit.op("Div", mean, deviation, shape=shape)
            scaled_mean = emit.op("Mul", values.gamma, normalized, shape=shape)
        else:
            z_mean, z_variance = _statistics(emit, z, shape)
            mean, variance = _of_float_layer(emit, values, z_mean, z_variance, _is_known(emit, values))
            deviation = emit.op("Sqrt", emit.op("Add", variance, epsilon, shape=shape), shape=shape)
            a = emit.op("Div", values.deviation, deviation, shape=shape)
            scaled_mean = emit.op("Mul", a, z_mean, shape=shape)
        return a, emit.op("Sub", values.beta, scaled_mean, shape=shape), mean, variance

    def normalize(self, trained: TrainedBatchNorm) -> None:
        """A batch norm of its own."""
        if _is_frozen_at_once(trained.freeze_bn_delay):
            return
        node = self._nodes[trained.node]
        x, gamma, beta, running_mean, running_variance = _present(node)
        readers, shape = _Readers.of(node.outputs[0]), gamma.shape
        emit = Emitter(self._graph, self._names, trained.node, node)
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        frozen = self._frozen(trained.freeze_bn_delay)
        if frozen is None:
            epsilons = emit.constant(np.full(() if shape is None else shape.numpy(), epsilon))
            y, batch_mean, batch_variance = _normalize(emit, x, gamma, beta, epsilons)
        else:
            batch_mean, batch_variance = _statistics(emit, x, shape)
            mean = emit.op("Where", frozen, running_mean, batch_mean, shape=shape)
            variance = emit.op("Where", frozen, running_variance, batch_variance, shape=shape)
            shifted = emit.op("Add", variance, emit.constant(epsilon), shape=shape)
            a = emit.op("Div", gamma, emit.op("Sqrt", shifted, shape=shape), shape=shape)
            b = emit.op("Sub", beta, emit.op("Mul", a, mean, shape=shape), shape=shape)
            y = emit.op(AFFINE, x, a, b, shape=x.shape, domain=DOMAIN)
        readers.read(y, self._names)
        momentum = node.attributes.get_float("momentum", 0.9)
        self._update(emit, (running_mean, running_variance), x, batch_mean, batch_variance, momentum, frozen)
        self._graph.remove(node, safe=True)

    def _frozen(self, delay: int | None) -> ir.Value | None:
        return None if delay is None else self._gates.at(delay)

    def _update(
        self,
        emit: Emitter,
        running: tuple[ir.Value, ir.Value],
        x: ir.Value,
        mean: ir.Value,
        variance: ir.Value,
        momentum: float,
        frozen: ir.Value | None,
    ) -> None:
        shape = mean.shape
        if self._training.bessel_correction:
            variance = _unbiased(emit, x, variance)
        for state, batch in zip(running, (mean, variance), strict=True):
            old = self._states.current(state)
            kept = emit.op("Mul", old, emit.constant(momentum), shape=shape)
            added = emit.op("Mul", batch, emit.constant(1 - momentum), shape=shape)
            new = emit.op("Add", kept, added, shape=shape)
            if frozen is not None:
                new = emit.op("Where", frozen, old, new, shape=shape)
            self._states.update(state, new)


def _is_frozen_at_once(delay: int | None) -> bool:
    return delay is not None and delay <= 1


@dataclasses.dataclass(frozen=True)
class _Readers:
    """Who reads a value now; another value can take its place for them."""

    value: ir.Value
    uses: tuple[tuple[ir.Node, int], ...]

    @classmethod
    def of(cls, value: ir.Value) -> _Readers:
        return cls(value, tuple((use.node, use.idx) for use in value.uses()))

    def read(self, other: ir.Value, names: FreeNames) -> None:
        for node, index in self.uses:
            node.replace_input_with(index, other)
        graph = other.graph
        assert graph is not None
        for index, output in enumerate(graph.outputs):
            if output is self.value:
                graph.outputs[index] = other
                other.name, self.value.name = self.value.name, names.take(f"{self.value.name}_unnormalized")


def _take_bias(layer: ir.Node, unfolded_bias: ir.Value) -> ir.Value:
    """The bias that the layer reads, rounded or not, which it then does without."""
    traits = traits_of(layer)
    assert traits is not None
    assert traits.bias is not None
    bias = layer.inputs[traits.bias]
    layer.resize_inputs(traits.bias)
    return unfolded_bias if bias is None else bias


def _float_layer(emit: Emitter, layer: ir.Node, weight_index: int, weight: ir.Value) -> ir.Value:
    """The layer once more, with W as it is."""
    inputs = _present(layer)
    inputs[weight_index] = weight
    attributes: dict[str, Any] = {attribute.name: attribute for attribute in layer.attributes.values()}
    return emit.op(layer.op_type, *inputs, shape=layer.outputs[0].shape, **attributes)


def _statistics(emit: Emitter, x: ir.Value, shape: ir.Shape | None) -> tuple[ir.Value, ir.Value]:
    mean, variance = emit.ops(STATISTICS, x, shapes=(shape, shape), domain=DOMAIN)
    return mean, variance


def _normalize(
    emit: Emitter, x: ir.Value, scale: ir.Value, shift: ir.Value, epsilon: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """x normalized with its own statistics, and these."""
    shape = scale.shape
    y, mean, variance, _ = emit.ops(
        NORMALIZE, x, scale, shift, epsilon, shapes=(x.shape, shape, shape, shape), domain=DOMAIN
    )
    return y, mean, variance


def _normalized(
    emit: Emitter, z: ir.Value, values: BatchNormValues, epsilon: float
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """a z + beta - a mean(z) as |gamma| (z - mean(z)) / sqrt(var(z) + epsilon k^2) + beta; mean and variance
    of u.

    Where k is 0 the scale is chosen so that a is 1.
    """
    shape = values.gamma.shape
    known = _is_known(emit, values)
    square = emit.op("Mul", values.factor, values.factor, shape=shape)
    scaled = emit.op("Mul", square, emit.constant(epsilon), shape=shape)
    tiny = emit.constant(_SMALLEST_FACTOR)
    epsilons = emit.op("Where", known, scaled, tiny, shape=shape)
    magnitude = emit.op("Abs", values.gamma, shape=shape)
    scale = emit.op("Where", known, magnitude, emit.constant(_SMALLEST_FACTOR**0.5), shape=shape)
    y, z_mean, z_variance = _normalize(emit, z, scale, values.beta, epsilons)
    mean, variance = _of_float_layer(emit, values, z_mean, z_variance, known)
    return y, mean, variance


def _is_known(emit: Emitter, values: BatchNormValues) -> ir.Value:
    """Where z says something of u."""
    size = emit.op("Abs", values.factor, shape=values.factor.shape)
    smallest = emit.constant(_SMALLEST_FACTOR)
    return emit.op("Greater", size, smallest, shape=size.shape, dtype=ir.DataType.BOOL)


def _of_float_layer(
    emit: Emitter, values: BatchNormValues, z_mean: ir.Value, z_variance: ir.Value, known: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Mean and variance of u = z / k; the running ones where z, quantized to 0, says nothing of u."""
    shape = values.factor.shape
    varies = emit.op("Greater", z_variance, emit.constant(0.0), shape=shape, dtype=ir.DataType.BOOL)
    known = emit.op("And", known, varies, shape=shape, dtype=ir.DataType.BOOL)
    k = emit.op("Where", known, values.factor, emit.constant(1.0), shape=shape)
    mean = emit.op("Div", z_mean, k, shape=shape)
    variance = emit.op("Div", emit.op("Div", z_variance, k, shape=shape), k, shape=shape)
    return (
        emit.op("Where", known, mean, values.mean, shape=shape),
        emit.op("Where", known, variance, values.variance, shape=shape),
    )


def _unbiased(emit: Emitter, x: ir.Value, variance: ir.Value) -> ir.Value:
    """n / (n - 1) times the variance, n elements a channel; one element has none."""
    assert x.shape is not None
    others = all_but_channels(len(x.shape))
    shape = emit.op("Shape", x, shape=[len(x.shape)], dtype=ir.DataType.INT64)
    axes = emit.constant(others, np.int64)
    sizes = emit.op("Gather", shape, axes, shape=[len(others)], dtype=ir.DataType.INT64, axis=0)
    # A sum of ones, as in rewriter.gradients: a cast of Size would be computed on the CPU.
    ones = emit.op("ConstantOfShape", sizes, shape=None, value=ir.tensor(np.ones(1, np.float32)))
    n, one = emit.op("ReduceSum", ones, shape=[], keepdims=0), emit.constant(1.0)
    less = emit.op("Max", emit.op("Sub", n, one, shape=[]), one, shape=[])
    return emit.op("Mul", variance, emit.op("Div", n, less, shape=[]), shape=variance.shape)


def _present(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]
