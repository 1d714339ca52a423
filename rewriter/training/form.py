"""The two forms of a model that trains: as it is evaluated, and as it is in a training step.

A `TrainingForm` begins with the QAT model, whose scales, zero points, folded weights and biases are
constants, and has them computed from what training changes: the form that is evaluated. `begin` turns the
graph into that of a training step. In both, quantizers with a delay wait for the step counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.fold.report import FoldReport
from rewriter.names import FreeNames
from rewriter.operators import is_constant
from rewriter.quantization import Plan
from rewriter.recipe import FoldStatistics, Recipe, TrainingDevice
from rewriter.targets import TARGETS
from rewriter.training.batch_norm import BatchNormTraining, TrainingBatchNorms
from rewriter.training.emitter import Emitter
from rewriter.training.learned_ranges import LearnedRange, learn_range
from rewriter.training.quantizers import GraphQuantizer, graph_quantizers
from rewriter.training.state import Gates, States, add_step_counter, count_step
from rewriter.training.tracked_ranges import Tracker, read_range
from rewriter.training.unfolding import unfold


class TrainingForm:
    """A model, in place.

    Attributes:
        states: the state in the checkpoint.
        learnable: the quantizers whose range may be trained; `learn` makes it so.
        learned, tracked: the ranges that training changes.
        batch_norm_parameters: initializers that are parameters because batch norms were folded.
    """

    def __init__(self, model: ir.Model, recipe: Recipe, plan: Plan, folding: FoldReport) -> None:
        policy = TARGETS[recipe.target]
        self._graph = model.graph
        self._names = FreeNames(model)
        self._recipe = recipe
        self._folding = folding
        self._training = BatchNormTraining(
            recipe.fold_statistics or policy.fold_statistics, policy.bessel_correction
        )
        self._head = Emitter(self._graph, self._names, "")
        self.states = States(self._graph, self._names)
        self.step_counter = add_step_counter(self.states)
        self._gates = Gates(self._head, self.step_counter)
        self._unfolded = unfold(self._graph, folding.folded, self._head, self.states)
        for trained in folding.trained:
            for name in (trained.tensors.running_mean, trained.tensors.running_variance):
                self.states.adopt(self._graph.initializers[name])
        quantizers = graph_quantizers(self._graph, plan.quantizers, recipe)
        self._insert_gates(quantizers)
        self.tracked = [
            read_range(self._graph, quantizer, self._head, self.states)
            for quantizer in quantizers
            if quantizer.ranges == "moving_average"
        ]
        self.learnable = [quantizer for quantizer in quantizers if quantizer.ranges == "learned"]
        self.learned: list[LearnedRange] = []

    @property
    def statistics(self) -> FoldStatistics:
        return self._training.statistics

    @property
    def device(self) -> TrainingDevice:
        return self._recipe.training_device

    @property
    def batch_norm_parameters(self) -> set[ir.Value]:
        return {
            value
            for one in self._unfolded
            for value in (one.original, one.values.gamma, one.values.beta)
            if is_constant(value)
        }

    @property
    def updated(self) -> list[str]:
        """Names of what the training graph itself updates: states, and scales and zero points made of
        them."""
        quantizers = [one.quantizer for one in self.tracked]
        tracked = [name for one in quantizers for name in (one.scale_name, one.zero_point_name)]
        return [*(state.name or "" for state in self.states.values), *tracked]

    def freezable(self, initializers: Sequence[str]) -> list[str]:
        """Of the QAT model's float initializers, and what batch norms were folded of, what could be
        trained."""
        computed = {name for one in self._unfolded for name in (one.fold.weight, one.fold.bias)}
        excluded = {*computed, *self.updated}
        names = [name for name in initializers if name not in excluded]
        names += [value.name or "" for value in self.batch_norm_parameters]
        return [*names, *(quantizer.zero_point_name for quantizer in self.learnable)]

    def learn(self, quantizer: GraphQuantizer, *, fixed_zero_point: bool) -> LearnedRange:
        """Train the range of one of `learnable`."""
        learned = learn_range(
            self._graph, quantizer, self._head, self._names, fixed_zero_point=fixed_zero_point
        )
        self.learned.append(learned)
        return learned

    def begin(self, reset: ir.Value) -> None:
        """From the form that is evaluated to that of a training step.

        Args:
            reset: what becomes the input `lazy_reset_grad`, bool [1].
        """
        batch_norms = TrainingBatchNorms(self._graph, self._names, self.states, self._gates, self._training)
        for unfolded in self._unfolded:
            batch_norms.normalize_layer(unfolded)
        for trained in self._folding.trained:
            batch_norms.normalize(trained)
        tracker = Tracker(self._graph, self._names, self.states)
        for tracked in self.tracked:
            tracker.track(tracked)
        first = Emitter(self._graph, self._names, "")
        count_step(first, self.step_counter, self.states, self._recipe.step_counter, reset)

    def _insert_gates(self, quantizers: list[GraphQuantizer]) -> None:
        """A bias is rounded once both of its scales are those of quantizers that act."""
        delays = {quantizer.scale: quantizer.quant_delay for quantizer in quantizers}
        for quantizer in quantizers:
            gate = self._gates.at(quantizer.quant_delay)
            if gate is not None:
                for one in quantizer.nodes:
                    fake_quantize.set_gate(one.node, gate)
        for node in self._graph:
            if fake_quantize.is_fake_quantize_bias(node):
                bias = fake_quantize.read_bias(node)
                delay = max(delays.get(scale, 0) for scale in (bias.x_scale, bias.weight_scale))
                gate = self._gates.at(delay)
                if gate is not None:
                    fake_quantize.set_gate(node, gate)
