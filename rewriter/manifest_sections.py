"""What the stages of `prepare` report, as sections of the manifest."""

from __future__ import annotations

from rewriter.fold.batch_norm import FoldReport
from rewriter.manifest import (
    FoldedEntry,
    FrozenEntry,
    QuantizedTensorEntry,
    QuantizerEntry,
    SkippedEntry,
    Target,
    Training,
)
from rewriter.normalize import NormalizationReport
from rewriter.quantization import ParametersByQuantizer, Plan, Quantizer, QuantizerParameters
from rewriter.training.artifacts import TrainingReport


def quantizers(
    plan: Plan, parameters: ParametersByQuantizer, report: TrainingReport
) -> tuple[QuantizerEntry, ...]:
    """One entry a quantizer, in graph order."""
    entries = []
    for quantizer in plan.quantizers:
        entries.append(_quantizer(quantizer, parameters[quantizer.name], report))
    return tuple(entries)


def folded(report: FoldReport) -> tuple[FoldedEntry, ...]:
    return tuple(FoldedEntry(batch_norm=one.batch_norm, node=one.layer, op=one.op) for one in report.folded)


def skipped(plan: Plan, report: FoldReport) -> tuple[SkippedEntry, ...]:
    """Nodes that are not quantized, then batch norms that are not folded."""
    nodes = (SkippedEntry(node=one.node, op=one.op, reason=one.reason) for one in plan.skipped)
    batch_norms = (
        SkippedEntry(node=one.node, op="BatchNormalization", reason=f"not folded: {one.reason}")
        for one in report.left
    )
    return (*nodes, *batch_norms)


def frozen(report: TrainingReport) -> tuple[FrozenEntry, ...]:
    return tuple(FrozenEntry(parameter=name, reason=reason) for name, reason in report.frozen.items())


def training(report: TrainingReport) -> Training:
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
        scales="exp" if report.scales else "fixed",
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
        range_state=report.range_states.get(quantizer.name),
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
