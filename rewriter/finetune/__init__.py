"""A reference training loop over `onnxruntime.training.api`: fine-tunes a bundle on an npz of samples.

The bundle does not depend on it: any loop over the stock API trains it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from rewriter import bundle as bundles
from rewriter.calibration.npz import NpzSamples
from rewriter.errors import ErrorCode, QatError
from rewriter.finetune.batches import Plan, in_memory
from rewriter.finetune.evaluation import Evaluation, HeldOut, Scoring
from rewriter.finetune.loop import Training
from rewriter.finetune.phases import Phase
from rewriter.finetune.records import Journal, Log, LogRecord, unlogged
from rewriter.finetune.resumption import Position, Run, describe_run, resume_from, weights_of
from rewriter.finetune.schedule import DEFAULT_LEARNING_RATE
from rewriter.installation import Device
from rewriter.load import load_from_bundle
from rewriter.manifest import Manifest
from rewriter.progress import Progress, silent
from rewriter.training.checkpoint import identity_of
from rewriter.training.runtime import open_session, training_api

__all__ = ["Evaluation", "FinetuneReport", "LogRecord", "Phase", "finetune"]


@dataclasses.dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        steps: of the optimizer, those before an interruption included.
        resumed_after: how many of them an interrupted run had done.
        losses: mean training loss of each epoch.
        before, after: on the evaluation samples, quantized as in training; None without them.
        checkpoint: the file written.
    """

    steps: int
    resumed_after: int
    losses: tuple[float, ...]
    before: Evaluation | None
    after: Evaluation | None
    checkpoint: pathlib.Path

    def summary(self) -> str:
        """A few lines for a person."""
        resumed = f", {self.resumed_after} of them before it was resumed" if self.resumed_after else ""
        losses = [f"{loss:.4f}" for loss in self.losses]
        if len(losses) > 10:
            losses[4:-4] = ["..."]
        lines = [
            f"{self.steps} steps{resumed}, loss per epoch: {', '.join(losses)}",
            f"checkpoint: {self.checkpoint}",
        ]
        for moment, result in (("before", self.before), ("after", self.after)):
            if result is not None:
                accuracy = "" if result.accuracy is None else f", top-1 {100 * result.accuracy:.2f} %"
                lines.append(f"{moment} training: loss {result.loss:.4f}{accuracy}")
        return "\n".join(lines)

    __str__ = summary


def finetune(
    bundle: pathlib.Path,
    data: pathlib.Path,
    *,
    evaluation: pathlib.Path | None = None,
    epochs: int = 1,
    batch_size: int = 32,
    accumulate: int = 1,
    learning_rate: float | None = None,
    warmup: int = 0,
    device: Device = "cpu",
    seed: int = 0,
    checkpoint: pathlib.Path | None = None,
    checkpoint_out: pathlib.Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    training_state: pathlib.Path | None = None,
    eval_every: int | None = None,
    log_every: int = 50,
    log: Log = unlogged,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
) -> FinetuneReport:
    """Train the weights and scales of a bundle.

    The learning rate rises over the warm-up, if there is one, and then falls to 0 along a half cosine.

    Args:
        bundle: bundle directory; its own files stay as they are.
        data: npz with one array per input of the training model, samples along the first axis: the model's
            inputs and `labels` or `targets`. Held in memory.
        evaluation: npz of the same form, evaluated before and after training and every `eval_every` steps.
        epochs: at least 1.
        batch_size: at least 1; ignored where the model prescribes one. The last, smaller batch of an epoch is
            used where the model allows it.
        accumulate: batches per step of the optimizer, which takes the mean of their gradients; at least 1.
            With more than 1, the samples that do not fill a step sit out an epoch, others each time.
            (onnxruntime sums gradients. SGD gets the learning rate divided by their number, which is the
            mean; AdamW's step is the same for the sum, but for its epsilon, which counts as that share.)
        learning_rate: the largest; more than 0. None: 1e-3 for adamw, 5e-2 for sgd.
        warmup: steps over which the rate rises to that; fewer than there are.
        seed: of the order of the samples, which changes every epoch.
        checkpoint: where to start from, with its weights and what the training graph keeps (step counter,
            ranges, running statistics), without the moments of an optimizer; None: as prepared.
        checkpoint_out: file to write when training is over, no file that `prepare` wrote; None:
            `trained_checkpoint` in the bundle, which `finalize` then uses.
        resume: whether to go on with the run that wrote `training_state`, which must have had the same data
            and arguments; the outcome is that of the run without an interruption, on the CPU to the bit.
        save_every: steps after which `training_state` is written; None: only when `stop` says so.
        training_state: resumable checkpoint, another file than `checkpoint_out`; it is removed when training
            is over. None: `training_state` in the bundle.
        eval_every: steps between two evaluations; None: every epoch.
        log_every: steps between two log records of training; further ones at the end of an epoch and where
            the phase changes.
        log: gets the records.
        stop: asked after every step whether to write `training_state` and end; may be set from a signal
            handler or another thread.

    Raises:
        QatError: `argument_invalid`, `bundle_invalid`, `data_*`, `output_unwritable`, `output_exists`,
            `resume_unavailable`, `resume_mismatch`, `training_runtime_missing`, `checkpoint_invalid` (all of
            them before any training), `run_failed`; `training_interrupted` when `stop` said so;
            `training_diverged` when the loss, or what the last step makes of a parameter, is not finite, and
            nothing is written then.
    """
    _require_arguments(
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        log_every=log_every,
        save_every=save_every,
        eval_every=eval_every,
    )
    _require_arguments(least=0, warmup=warmup, seed=seed)
    _require_rate(learning_rate)
    if resume and checkpoint is not None:
        raise _invalid("checkpoint", "a run that is resumed starts from its own: leave one of them out")
    target = checkpoint_out or bundle / bundles.TRAINED_CHECKPOINT
    state_file = training_state or bundle / bundles.TRAINING_STATE
    training_api()  # or say that it is missing, before what takes time
    manifest = bundles.read_manifest(bundle, verify_all=True)
    _require_writable(bundle, target, state_file)

    model = load_from_bundle(bundle / bundles.EVAL_MODEL)
    scoring = Scoring.of(model, manifest)
    inputs = _inputs(model, manifest)
    samples = NpzSamples.open(data, inputs)
    held_out = None if evaluation is None else HeldOut.open(evaluation, inputs, batch_size)
    plan = Plan.of(samples, data, batch_size, accumulate, epochs, seed)
    if warmup >= plan.steps:
        raise _invalid("warmup", f"it is {warmup}, and there are {plan.steps} steps in all")
    arrays = in_memory(samples)
    if scoring is not None:
        scoring.require_labels(arrays, data)
    optimizer = manifest.training.optimizer
    run = Run(
        data=bundles.describe(data).sha256,
        epochs=epochs,
        batch_size=plan.batch_size,
        accumulate=accumulate,
        learning_rate=DEFAULT_LEARNING_RATE[optimizer] if learning_rate is None else learning_rate,
        warmup=warmup,
        seed=seed,
        optimizer=optimizer,
        device=device,
    )

    position = Position()
    with contextlib.ExitStack() as stack:
        start = checkpoint
        if resume:
            start = state_file
            position = resume_from(state_file, run, identity_of(bundle / bundles.TRAINING_MODEL))
        elif checkpoint is not None:
            start = stack.enter_context(weights_of(checkpoint))
        session = open_session(bundle, start, device=device)
    resumed_after = position.step
    training = Training(
        session=session,
        model=model,
        manifest=manifest,
        arrays=arrays,
        plan=plan,
        run=run,
        held_out=held_out,
        scoring=scoring,
        journal=Journal(log, plan.steps, epochs, log_every),
        progress=progress,
        stop=stop,
        eval_every=eval_every,
        save_every=save_every,
        state_file=state_file,
    )
    after = training.go(position)
    describe_run(session, run, position)  # the same file, whether interrupted or not
    session.save(target)
    if resume or save_every is not None:
        state_file.unlink(missing_ok=True)
    return FinetuneReport(plan.steps, resumed_after, tuple(position.losses), position.before, after, target)


def _require_arguments(least: int = 1, **arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and value < least:
            raise _invalid(name, f"it is {value} and must be at least {least}")


def _require_rate(learning_rate: float | None) -> None:
    largest = float(np.finfo(np.float32).max)
    if learning_rate is not None and not 0 < learning_rate <= largest:
        raise _invalid(
            "learning_rate", f"it is {learning_rate} and must be more than 0, and finite in float32"
        )


def _invalid(name: str, why: str) -> QatError:
    return QatError(ErrorCode.ARGUMENT_INVALID, f"{name} cannot be meant: {why}.", field=name)


def _require_writable(bundle: pathlib.Path, target: pathlib.Path, state_file: pathlib.Path) -> None:
    """Before any training: what it writes can be written."""
    for file in (target, state_file):
        bundles.require_elsewhere(file, bundle)
        with bundles.new_file(file):
            pass
    if target.resolve() == state_file.resolve():
        raise _invalid("training_state", f"{state_file} is the checkpoint that is written in the end")


def _inputs(model: ir.Model, manifest: Manifest) -> Sequence[ir.Value]:
    """What a step is fed, with the types and shapes that the eval model declares."""
    by_name = {value.name: value for value in model.graph.inputs}
    names = manifest.training.inputs
    if not by_name.keys() >= set(names):
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            f"The eval model has other inputs than {bundles.MANIFEST} says: prepare the bundle again.",
            file=bundles.EVAL_MODEL,
        )
    return [by_name[name] for name in names]
