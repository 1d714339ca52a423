"""From a bundle and a checkpoint to an int8 model that stock onnxruntime runs with integer kernels."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from pydantic import BaseModel, ConfigDict

from rewriter import bundle as bundles
from rewriter.calibration.npz import NpzSamples
from rewriter.fake_quantize import is_fake_quantize, read
from rewriter.finalize.biases import quantize_biases
from rewriter.finalize.verification import (
    FLOAT_KERNELS,
    INTEGER_KERNELS,
    Agreement,
    compare,
    count_layer_kernels,
)
from rewriter.finalize.weights import quantize_weights
from rewriter.fold.activations import absorb_activations
from rewriter.inference import NO_SATURATION
from rewriter.load import load_from_bundle, save
from rewriter.lowering import lower
from rewriter.manifest import FileEntry, Manifest
from rewriter.normalize.quantize_pairs import RaiseQuantizePairs
from rewriter.progress import Progress, silent
from rewriter.training.checkpoint import identity_of, latest_checkpoint, read_checkpoint
from rewriter.training.trained_values import apply_trained_checkpoint

__all__ = ["Agreement", "FinalizeReport", "finalize"]


class FinalizeReport(BaseModel):
    """What came out of `finalize`.

    Attributes:
        files: name, digest and size of the int8 model, and of the file with its weights if they are too
            large for one.
        layer_kernels: how many convolutions and matrix products onnxruntime runs, by kernel, with all
            optimizations on.
        agreement: the comparison with the trained model, when samples were given.
    """

    model_config = ConfigDict(frozen=True)

    files: tuple[FileEntry, ...]
    integer_weights: int
    layer_kernels: dict[str, int]
    agreement: Agreement | None
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """Two or three lines for a person."""
        integer = sum(n for op, n in self.layer_kernels.items() if op in INTEGER_KERNELS)
        left = {op: n for op, n in self.layer_kernels.items() if op in FLOAT_KERNELS}
        lines = [
            f"{self.files[0].name}: {sum(file.bytes for file in self.files)} bytes, "
            f"{self.integer_weights} integer weights",
            f"onnxruntime runs {integer} layers with integer kernels"
            + (f", {sum(left.values())} in float ({left})" if left else ", none in float"),
        ]
        if (agreement := self.agreement) is not None:
            lines.append(
                f"{agreement.samples} samples: "
                + ("" if agreement.top1 is None else f"same top-1 on {agreement.top1:.2%}, ")
                + f"largest difference {agreement.largest_difference:.3g} = "
                + f"{agreement.largest_difference_in_steps:.3g} steps of the output (optimizations off)"
            )
        return "\n".join(lines)


def finalize(
    bundle: pathlib.Path,
    output: pathlib.Path,
    *,
    checkpoint: pathlib.Path | None = None,
    verify: pathlib.Path | None = None,
    progress: Progress = silent,
) -> FinalizeReport:
    """Write the int8 QDQ model of a trained bundle.

    Args:
        bundle: bundle directory.
        output: ONNX file to write; it appears whole or not at all, and replaces one of the same name.
            Weights of more than 1.8 GiB go to `{output}.data`.
        checkpoint: trained checkpoint; None: the latest in the bundle.
        verify: npz of samples on which the result is compared with the trained fake-quantized model.

    Raises:
        QatError: `bundle_invalid`, `checkpoint_invalid`, `output_exists`, `output_unwritable`, `data_*`,
            `run_failed`.
    """
    bundles.require_elsewhere(output, bundle)
    manifest = bundles.read_manifest(bundle, verify_all=True)
    progress("load", 0.0)
    model = load_from_bundle(bundle / bundles.QAT_MODEL)
    RaiseQuantizePairs()(model)
    RemoveUnusedNodesPass()(model)
    identity = identity_of(bundle / bundles.TRAINING_MODEL)
    parameters = read_checkpoint(checkpoint or latest_checkpoint(bundle), identity)
    evaluation = load_from_bundle(bundle / bundles.EVAL_MODEL)
    apply_trained_checkpoint(model, evaluation, manifest, parameters)
    delayed = _delayed(manifest, parameters)
    progress("load", 1.0)

    with tempfile.TemporaryDirectory() as scratch, bundles.new_file(output) as staging:
        samples = None
        reference = pathlib.Path(scratch, "reference.onnx")
        if verify is not None:
            samples = NpzSamples.open(verify, model.graph.inputs)
            trained = model.clone()
            lower(trained, saturation="between")
            save(trained, reference)
        steps = _output_steps(model)

        progress("quantize", 0.0)
        absorb_activations(model)
        raised = quantize_biases(model)
        integer_weights = quantize_weights(model)
        lower(model, saturation="between")
        RemoveUnusedNodesPass()(model)
        files = save(model, staging)
        progress("quantize", 1.0)

        progress("verify", 0.0)
        kernels = count_layer_kernels(staging)
        agreement = None if samples is None else compare(reference, staging, samples, steps)
        progress("verify", 1.0)
        entries = tuple(bundles.describe_file(path) for path in files)
    return FinalizeReport(
        files=entries,
        integer_weights=integer_weights,
        layer_kernels=kernels,
        agreement=agreement,
        warnings=(
            *delayed,
            *_saturation(agreement),
            *(
                f"{change.scale}: raised on {change.channels} channel(s) so that the bias fits into int32"
                for change in raised
            ),
        ),
    )


def _delayed(manifest: Manifest, parameters: Mapping[str, npt.NDArray[np.float32]]) -> tuple[str, ...]:
    """The warning that training ended before all quantizers were on: what it evaluated is not the result."""
    steps = int(parameters[manifest.training.step_counter.state])
    off = sum(entry.quant_delay > max(steps, 1) for entry in manifest.quantizers)
    if not off:
        return ()
    return (
        f"after {steps} steps {off} of {len(manifest.quantizers)} quantizers still wait for their "
        "quant_delay: the model was trained and evaluated without them",
    )


def _saturation(agreement: Agreement | None) -> tuple[str, ...]:
    """The warning that onnxruntime's integer kernels do not compute on this CPU what the model says."""
    if agreement is None or not agreement.saturates:
        return ()
    name, value = NO_SATURATION
    advice = (
        "on the CPU that finalize ran on (x86 without VNNI) sums of 8-bit products saturate in onnxruntime's "
        f"default kernels: give sessions there the config entry {name} = {value}, or prepare the model with "
        "weight_bits 7"
    )
    before, after = agreement.top1, agreement.top1_without_saturation
    if before is None or after is None:
        return (advice,)
    return (f"{advice} (same top-1 on {before:.2%} without the entry, {after:.2%} with it)",)


def _output_steps(model: ir.Model) -> dict[str, float]:
    """Quantization step of each graph output that a per-tensor quantizer writes."""
    steps = {}
    for output in model.graph.outputs:
        producer = output.producer()
        if is_fake_quantize(producer) and producer is not None:
            quantizer = read(producer)
            if quantizer.axis is None and quantizer.scale.const_value is not None:
                steps[output.name or ""] = float(quantizer.scale.const_value.numpy())
    return steps
