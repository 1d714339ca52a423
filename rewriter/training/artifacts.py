"""Writes what stock onnxruntime-training trains: training, eval and optimizer model, and the checkpoint.

The layout is that of `onnxruntime.training.artifacts.generate_artifacts`:

    inputs    the model's own, the target, then per parameter its value (trainable and frozen, in the same
              order in both models, because the eval model is fed by position); training model only:
              `P_grad.accumulation.buffer` per trainable parameter P, `lazy_reset_grad`
    outputs   the loss; training model: `P_grad.accumulation.out` per P; eval model: the model's own outputs

The weights are written once, to the checkpoint.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter import bundle as bundles
from rewriter.channel_operators import lower_channel_operators
from rewriter.errors import ErrorCode, QatError
from rewriter.fake_quantize import is_fake_quantize
from rewriter.fold.report import FoldReport
from rewriter.gradients import differentiate, trainability
from rewriter.lowering import lower
from rewriter.names import FreeNames
from rewriter.operators import MICROSOFT
from rewriter.quantization import NO_PLAN, Plan
from rewriter.recipe import FoldStatistics, LossKind, OptimizerName, Recipe
from rewriter.training import layout
from rewriter.training.checkpoint import identity_of, stamp, write_checkpoint
from rewriter.training.form import TrainingForm
from rewriter.training.losses import Attachment, Dim, attach_loss
from rewriter.training.optimizer import optimizer_model
from rewriter.training.parameters import (
    choose_parameters,
    float_names,
    matches,
    quantizer_scales,
    require_frozen_names,
)
from rewriter.training.recomputation import recompute_dequantized
from rewriter.training.reserved_names import is_reserved, rename


@dataclasses.dataclass(frozen=True)
class TargetInput:
    """The graph input that the loss adds: labels (int64) or targets (float32)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """What a training loop has to feed, what it gets, and what it changes.

    Attributes:
        loss: name of the loss, the first output of the training and of the eval model.
        loss_kind: the built-in loss; "graph" when the model computes its own.
        output: the model output that the loss belongs to.
        attached_to: the tensor that the loss reads: that output, or the scores before its softmax.
        target: None for "graph".
        inputs: everything a step is fed, in order, the target last.
        eval_outputs: outputs of the eval model after the loss: the model's own.
        trainable: parameters in the checkpoint that training changes, in the models' order; the parameters
            of scales and zero points among them.
        frozen: float parameters and scales that training does not change, and why.
        state: what the checkpoint holds and the training graph updates, in the models' order.
        step_counter: the one among them that counts the steps.
        scale_parameters, zero_point_parameters: initializer of each trained scale or zero point -> its
            parameter.
        range_states: quantizer -> the states of its tracked range; the low end, if it has one, and the high.
        statistics: what folded batch norms take the statistics of the batch of.
        warnings: sentences for a person.
    """

    loss: str
    loss_kind: LossKind
    output: str
    attached_to: str
    target: TargetInput | None
    inputs: tuple[str, ...]
    eval_outputs: tuple[str, ...]
    optimizer: OptimizerName
    trainable: tuple[str, ...]
    frozen: dict[str, str]
    state: tuple[str, ...]
    step_counter: str
    scale_parameters: dict[str, str]
    zero_point_parameters: dict[str, str]
    range_states: dict[str, tuple[str, ...]]
    statistics: FoldStatistics
    warnings: tuple[str, ...]


def write_training_artifacts(
    model: ir.Model,
    recipe: Recipe,
    folder: pathlib.Path,
    *,
    plan: Plan = NO_PLAN,
    folding: FoldReport | None = None,
) -> TrainingReport:
    """Write training_model.onnx, eval_model.onnx, optimizer_model.onnx and checkpoint into `folder`.

    The eval model is the QAT model with what training changes as parameters, and state. From it follows the
    training model: batch norms normalize with the statistics of the batch, ranges are tracked, steps counted,
    and the gradients and the updates of the state are appended.

    Args:
        model: the QAT model: FakeQuantize nodes, weights and scales as initializers, opset 18, nodes in
            topological order. It is not changed, and its weights are not copied.
        plan: where the ranges of its quantizers come from, and when they begin; quantizers that it does not
            name are what the recipe says of all.
        folding: which batch norms train, folded or on their own.
        folder: an existing directory.

    Raises:
        QatError: `loss_invalid`, `nothing_to_train`, `gradient_unsupported`, `recipe_scope_unmatched`,
            `model_invalid` for input names that onnxruntime-training reserves, `training_runtime_missing`.
    """
    training = model.clone()
    graph = training.graph
    _require_free_names(graph)
    _remove_on_grid(graph)
    own_outputs = list(graph.outputs)
    attachment = attach_loss(training, recipe.loss)
    loss = attachment.loss
    if is_reserved(loss.name or ""):  # the model's own loss: the API would not return it
        rename([loss], FreeNames(training))
    graph.outputs[:] = [loss, *(output for output in own_outputs if output is not loss)]
    names = float_names(graph)
    form = TrainingForm(training, recipe, plan, folding or FoldReport())
    require_frozen_names(recipe.frozen, form.freezable(names), form.updated)
    trained, frozen = _trained_values(graph, recipe, loss, form)

    evaluation = training.clone()
    reset = ir.Value(name=layout.RESET, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    form.begin(reset)
    parameters = _in_checkpoint(graph, trained, form)
    trainable = [value for value in parameters if value in trained]
    report = TrainingReport(
        loss=loss.name or "",
        loss_kind=attachment.kind,
        output=attachment.output,
        attached_to=attachment.attached_to,
        target=_target(attachment),
        inputs=_names(graph.inputs),
        eval_outputs=_names(evaluation.graph.outputs[1:]),
        optimizer=recipe.optimizer,
        trainable=_names(trainable),
        frozen=frozen,
        state=_names(value for value in parameters if value in form.states.values),
        step_counter=form.step_counter.name or "",
        scale_parameters={one.scale.name or "": one.parameter.name or "" for one in form.learned},
        zero_point_parameters={
            one.quantizer.zero_point_name: one.offset.name or ""
            for one in form.learned
            if one.offset is not None
        },
        range_states={one.quantizer.name: _names(one.states) for one in form.tracked},
        statistics=form.statistics,
        warnings=attachment.warnings,
    )

    _write_eval_model(evaluation, parameters, folder / bundles.EVAL_MODEL)
    write_checkpoint(
        trainable, [value for value in parameters if value not in trained], folder / bundles.CHECKPOINT
    )
    # In the training model these are inner values.
    rename([output for output in graph.outputs if is_reserved(output.name or "")], FreeNames(training))
    data = list(graph.inputs)
    _add_gradients(training, loss, trainable, form, _names(parameters), reset)
    lower(training, saturation="before", for_training=True)
    recompute_dequantized(graph, loss, data)
    _write(training, folder / bundles.TRAINING_MODEL)
    stamp(folder / bundles.CHECKPOINT, identity_of(folder / bundles.TRAINING_MODEL))
    optimizer = optimizer_model(
        recipe.optimizer,
        opset=graph.opset_imports[""],
        ir_version=min(model.ir_version, layout.NEWEST_IR_VERSION),
    )
    (folder / bundles.OPTIMIZER_MODEL).write_bytes(optimizer.SerializeToString(deterministic=True))
    return report


def _require_free_names(graph: ir.Graph) -> None:
    for value in graph.inputs:
        name = value.name or ""
        if is_reserved(name):
            raise QatError(
                ErrorCode.MODEL_INVALID,
                f"onnxruntime-training takes an input called {name!r} for a gradient: rename it.",
                field=name,
            )


def _remove_on_grid(graph: ir.Graph) -> None:
    """Drop the quantizers that change nothing: the values are on their grid already."""
    for node in list(graph):
        if is_fake_quantize(node) and node.attributes["on_grid"].as_int():
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            if y.is_graph_output():
                continue  # the name of an output is the model's
            y.replace_all_uses_with(x)
            graph.remove(node, safe=True)


def _trained_values(
    graph: ir.Graph, recipe: Recipe, loss: ir.Value, form: TrainingForm
) -> tuple[set[ir.Value], dict[str, str]]:
    """The parameters to train, and every other float parameter with the reason; learned ranges are made
    so."""
    known = form.batch_norm_parameters
    choice = choose_parameters(graph, recipe.frozen, known=known, excluded=form.states.values)
    frozen = dict(choice.frozen)
    scales = []
    for quantizer in form.learnable:
        name = quantizer.scale.name or ""
        prefix = _frozen_by(name, recipe)
        if prefix is None:
            scales.append(quantizer.scale)
        else:
            frozen[name] = f"frozen by the recipe ({prefix!r})"
    if not choice.candidates and not scales and recipe.frozen:
        raise QatError(
            ErrorCode.NOTHING_TO_TRAIN,
            f"The recipe's `frozen` leaves no parameter to train: {', '.join(map(repr, recipe.frozen))}.",
            field="frozen",
        )
    verdict = trainability(graph, loss, [*choice.candidates, *scales])
    frozen.update(verdict.frozen)
    names = set(verdict.trainable)
    trained = {value for value in choice.candidates if value.name in names}
    for quantizer in form.learnable:
        if quantizer.scale.name in names and quantizer.scale in scales:
            zero_point = quantizer.zero_point.name or ""
            fixed = _frozen_by(zero_point, recipe)
            if fixed is not None:
                frozen[zero_point] = f"frozen by the recipe ({fixed!r})"
            trained.update(form.learn(quantizer, fixed_zero_point=fixed is not None).parameters)
    return trained, frozen


def _frozen_by(name: str, recipe: Recipe) -> str | None:
    return next((prefix for prefix in recipe.frozen if matches(name, prefix)), None)


def _in_checkpoint(graph: ir.Graph, trained: Collection[ir.Value], form: TrainingForm) -> list[ir.Value]:
    """The initializers that move to the checkpoint, in graph order: what is trained, the state, and of the
    rest what is too large to be in both models. Scales that are not trained stay constants of their Q/DQ
    pairs."""
    constants = {*quantizer_scales(graph), *(c for learned in form.learned for c in learned.constants)}
    states = set(form.states.values)
    return [
        value
        for value in graph.initializers.values()
        if value in trained
        or value in states
        or (
            value.dtype == ir.DataType.FLOAT
            and value.const_value is not None
            and value.const_value.size >= _LARGE
            and value not in constants
        )
    ]


def _write_eval_model(evaluation: ir.Model, parameters: Sequence[ir.Value], path: pathlib.Path) -> None:
    """Its parameters are fed by position: those that it does not read are inputs too."""
    graph = evaluation.graph
    RemoveUnusedNodesPass()(evaluation)
    for parameter in parameters:
        value = graph.initializers.pop(parameter.name or "", None)
        if value is None:
            value = ir.Value(name=parameter.name, shape=parameter.shape, type=parameter.type)
        value.const_value = None
        graph.inputs.append(value)
    lower(evaluation, saturation="before", for_training=True)
    _write(evaluation, path)


def _add_gradients(
    training: ir.Model,
    loss: ir.Value,
    trainable: Sequence[ir.Value],
    form: TrainingForm,
    parameters: Sequence[str],
    reset: ir.Value,
) -> None:
    """Turn the forward model into the training model: gradients, their accumulation, the updates of the
    state, parameters as inputs."""
    graph = training.graph
    gradients = differentiate(graph, loss, trainable, device=form.device)
    lower_channel_operators(graph)
    graph.opset_imports.setdefault(MICROSOFT, 1)
    _move_to_inputs(graph, parameters)
    graph.outputs[:] = [loss, *(gradients[value] for value in trainable), *form.states.updated]
    RemoveUnusedNodesPass()(training)

    names = FreeNames(training)
    graph.outputs[:] = [loss]
    for value in trainable:
        gradient = gradients[value]
        gradient.name = names.take(f"{value.name}{layout.GRADIENT}")
        buffer = ir.Value(
            name=f"{value.name}{layout.BUFFER}",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        done = ir.Value(
            name=f"{value.name}{layout.ACCUMULATED}",
            shape=ir.Shape([1]),
            type=ir.TensorType(ir.DataType.BOOL),
        )
        graph.inputs.append(buffer)
        graph.outputs.append(done)
        graph.append(
            ir.node(
                "InPlaceAccumulatorV2",
                [buffer, gradient, reset],
                domain=MICROSOFT,
                outputs=[done],
                name=names.take(f"{value.name}{layout.ACCUMULATION}"),
            )
        )
    graph.inputs.append(reset)
    form.states.write_updates()


def _move_to_inputs(graph: ir.Graph, names: Sequence[str]) -> None:
    for name in names:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)


def _write(model: ir.Model, path: pathlib.Path) -> None:
    model.ir_version = min(model.ir_version, layout.NEWEST_IR_VERSION)
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _target(attachment: Attachment) -> TargetInput | None:
    target = attachment.target
    if target is None or target.dtype is None:
        return None
    return TargetInput(target.name or "", target.dtype.numpy().name, attachment.target_shape)


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(value.name or "" for value in values)


_LARGE: Final = 1024  # elements; below that a frozen tensor is kept in both models
