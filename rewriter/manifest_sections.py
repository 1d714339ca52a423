"""What the stages of `prepare` report, as sections of the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rewriter.fold.report import BatchNormTensors, FoldReport
from rewriter.manifest import (
    BatchNorms,
    BatchNormState,
    FoldedEntry,
    FrozenEntry,
    QuantizedTensorEntry,
    QuantizerEntry,
    SkippedEntry,
    StepCounter,
    Target,
    TrainedBatchNormEntry,
    Training,
)
from rewriter.normalize import NormalizationReport
from rewriter.quantization import ParametersByQuantizer, Plan, Quantizer, QuantizerParameters
from rewriter.recipe import CounterUnit, FoldStatistics, Recipe
from rewriter.training.artifacts import TrainingReport


def quantizers(
    plan: Plan, parameters: ParametersByQuantizer, report: TrainingReport
) -> tuple[QuantizerEntry, ...]:
    """One entry a quantizer, in graph order."""
    entries = []
    for quantizer in plan.quantizers:
        entries.append(_quantizer(quantizer, parameters[quantizer.name], report))
    return tuple(entries)


def folded(report: FoldReport, statistics: FoldStatistics) -> tuple[FoldedEntry, ...]:
    """Args: statistics: of what, for those that are folded in training."""
    return tuple(
        FoldedEntry(
            batch_norm=one.batch_norm,
            node=one.layer,
            op=one.op,
            statistics=None if one.training is None else statistics,
            freeze_bn_delay=None if one.training is None else one.training.freeze_bn_delay,
            state=None if one.training is None else _state(one.training.tensors),
        )
        for one in report.folded
    )


def batch_norms(report: FoldReport, recipe: Recipe) -> BatchNorms:
    return BatchNorms(
        found=report.found,
        training_mode=len(report.training_mode),
        trained=tuple(
            TrainedBatchNormEntry(
                node=one.node,
                reason=one.reason,
                freeze_bn_delay=one.freeze_bn_delay,
                state=_state(one.tensors),
            )
            for one in report.trained
        ),
        note=_batch_norm_note(report, recipe),
    )


def ineffective_freeze(report: FoldReport, recipe: Recipe) -> tuple[str, ...]:
    """The warning that freeze_bn_delay was asked for, and no batch norm trains."""
    acts = report.trained or any(one.training is not None for one in report.folded)
    return () if recipe.freeze_bn_delay is None or acts else (_batch_norm_note(report, recipe),)


def _batch_norm_note(report: FoldReport, recipe: Recipe) -> str:
    asked = recipe.freeze_bn_delay is not None
    if not report.found:
        return (
            "The model has no BatchNormalization: there is none in it, or the exporter folded it already. "
            f"freeze_bn_delay {'has no effect' if asked else 'would have none'}."
        )
    came = "The model was exported for inference (training_mode 0)."
    if report.training_mode:
        came = (
            f"{len(report.training_mode)} of {report.found} batch norms came in training mode; they are "
            "taken for ones with their running statistics"
        )
        if still := len(report.still_in_training_mode):
            came += f", but for {still} that normalize(s) with every batch also when the model is used"
        came += "."
    training = [one.training for one in report.folded if one.training is not None]
    acting = len(training) + len(report.trained)
    if not acting:
        return f"{came} None trains: freeze_bn_delay {'has no effect' if asked else 'would have none'}."
    delays = {one.freeze_bn_delay for one in training} | {one.freeze_bn_delay for one in report.trained}
    if delays == {None}:
        effect = "until the end: freeze_bn_delay is null"
    elif len(delays) == 1:
        effect = f"before training step {delays.pop()}, and with their running statistics from then on"
    else:
        effect = "until they freeze, each at its freeze_bn_delay"
    return (
        f"{came} In training {acting} of {report.found} batch norms normalize with the statistics of the "
        f"batch, {effect}. The running statistics that the model came with are where they start."
    )


def training_mode(report: FoldReport) -> tuple[str, ...]:
    """The warnings about batch norms that were exported in training mode."""
    warnings = []
    changed = [name for name in report.training_mode if name not in report.still_in_training_mode]
    if changed:
        warnings.append(
            f"{_these(changed)} exported in training mode: taken for one with its running statistics, which "
            "the model itself does not use"
        )
    if report.still_in_training_mode:
        warnings.append(
            f"{_these(report.still_in_training_mode)} left in training mode, because the model reads what "
            "it makes of its statistics, or the scope leaves it out: outputs depend on the batch, and what "
            "stands before it does not train; export the model in inference mode"
        )
    return tuple(warnings)


def _these(names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"BatchNormalization {names[0]!r}{others}"


def _state(tensors: BatchNormTensors) -> BatchNormState:
    return BatchNormState(**dataclasses.asdict(tensors))


def skipped(plan: Plan, report: FoldReport) -> tuple[SkippedEntry, ...]:
    """Nodes that are not quantized, then batch norms that are left as they were."""
    nodes = (SkippedEntry(node=one.node, op=one.op, reason=one.reason) for one in plan.skipped)
    batch_norms = (
        SkippedEntry(node=one.node, op="BatchNormalization", reason=f"not folded: {one.reason}")
        for one in report.left
    )
    return (*nodes, *batch_norms)


def frozen(report: TrainingReport) -> tuple[FrozenEntry, ...]:
    return tuple(FrozenEntry(parameter=name, reason=reason) for name, reason in report.frozen.items())


def training(report: TrainingReport, counts: CounterUnit) -> Training:
    """What the report says that is not listed elsewhere in the manifest."""
    target = report.target
    return Training(
        loss=report.loss,
        loss_kind=report.loss_kind,
        output=report.output,
        attached_to=report.attached_to,
        target=None if target is None else Target(name=target.name, dtype=target.dtype, shape=target.shape),
        inputs=report.inputs,
        eval_outputs=report.eval_outputs,
        optimizer=report.optimizer,
        trainable=report.trainable,
        state=report.state,
        step_counter=StepCounter(state=report.step_counter, counts=counts),
        scales="exp" if report.scale_parameters else "fixed",
    )


def false_shape(name: str | None) -> tuple[str, ...]:
    """The warning about declared shapes, if one is false."""
    if name is None:
        return ()
    return (
        f"the model declares a shape for {name!r} that its operators do not compute: the declared shapes "
        "are ignored, and inferred instead",
    )


def warnings(
    normalization: NormalizationReport,
    plan: Plan,
    parameters: ParametersByQuantizer,
    report: TrainingReport,
) -> tuple[str, ...]:
    """What the owner of the model should know before training."""
    found = [*normalization.warnings, *report.warnings]
    found.extend(p.warning for p in parameters.values() if p.warning is not None)
    uncalibrated = sum(p.initialized.startswith("uncalibrated") for p in parameters.values())
    if uncalibrated:
        activations = sum(quantizer.kind == "activation" for quantizer in plan.quantizers)
        found.append(
            f"{uncalibrated} of {activations} activation quantizers are uncalibrated: give calibration "
            "samples for ranges that fit the data"
        )
    return tuple(found)


def _quantizer(
    quantizer: Quantizer, parameters: QuantizerParameters, report: TrainingReport
) -> QuantizerEntry:
    return QuantizerEntry(
        name=quantizer.name,
        tensor=quantizer.tensors[0].name,
        kind=quantizer.kind,
        bits=quantizer.bits,
        symmetric=quantizer.symmetric,
        qmin=quantizer.range.qmin,
        qmax=quantizer.range.qmax,
        dtype=quantizer.range.dtype.name,
        axis=quantizer.axis,
        ranges=quantizer.ranges,
        quant_delay=quantizer.quant_delay,
        scale=quantizer.scale_name,
        scale_parameter=report.scale_parameters.get(quantizer.scale_name),
        zero_point=quantizer.zero_point_name,
        zero_point_parameter=report.zero_point_parameters.get(quantizer.zero_point_name),
        range_states=report.range_states.get(quantizer.name, ()),
        initial_scale=tuple(float(s) for s in parameters.scale.reshape(-1)),
        initial_zero_point=tuple(int(z) for z in parameters.zero_point.reshape(-1)),
        initialized=parameters.initialized,
        existing=quantizer.existing,
        nodes=tuple(dict.fromkeys(node for tensor in quantizer.tensors for node in tensor.consumers)),
        tensors=tuple(
            QuantizedTensorEntry(tensor=t.name, nodes=t.consumers, on_grid=t.on_grid)
            for t in quantizer.tensors
        ),
    )
