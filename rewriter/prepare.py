"""From a float ONNX file to a bundle: the stages in order, and what the manifest says about them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib

import onnx_ir as ir
import onnxruntime

from rewriter import bundle as bundles
from rewriter import inference
from rewriter import manifest_sections as sections
from rewriter.calibration import calibrate
from rewriter.errors import ErrorCode, QatError
from rewriter.fold.batch_norm import fold_batch_norms
from rewriter.insertion import insert
from rewriter.installation import training_build
from rewriter.load import FALSE_SHAPE, external_data_files, load, load_from_bundle, save
from rewriter.lowering import lower
from rewriter.manifest import Manifest, Normalization, Source
from rewriter.normalize import normalize
from rewriter.placement import place
from rewriter.progress import Progress, silent
from rewriter.quantization import Plan, QuantizerParameters
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.checkpoint import read_checkpoint
from rewriter.training.reserved_names import free_reserved_names
from rewriter.training.runtime import open_session
from rewriter.training.trained_values import apply_checkpoint


def prepare(
    model: pathlib.Path,
    output: pathlib.Path,
    *,
    recipe: Recipe | None = None,
    calibration: pathlib.Path | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Write the bundle of a float model: it appears whole or not at all.

    Args:
        model: ONNX file; its external data must lie in its own folder.
        output: bundle directory to make.
        recipe: None for the defaults.
        calibration: npz with one float array per graph input, samples along the first axis; None: ranges
            come from the model alone, which the manifest states.
        replace: whether an existing `output` is replaced; otherwise it is an error.
        progress: called with (stage, share done).

    Raises:
        QatError: the model, the recipe or the samples cannot be processed; see `ErrorCode`.
    """
    recipe = recipe or Recipe()
    recipe.require_supported()
    training_build()  # its absence is said before the work, not after it
    if replace:
        bundles.require_outside(output, [model] if calibration is None else [model, calibration])
    with bundles.new_directory(output, replace=replace) as folder:
        progress("load", 0.0)
        graph = load(model)
        source = _source(model, external_data_files(graph))
        progress("load", 1.0)

        progress("normalize", 0.0)
        false_shape = graph.meta.get(FALSE_SHAPE)
        normalization = normalize(graph)
        free_reserved_names(graph)
        folding = fold_batch_norms(graph, recipe)
        progress("normalize", 1.0)

        plan = place(graph, recipe)
        parameters = calibrate(
            graph, plan, recipe, calibration, statistics=folding.statistics, progress=progress
        )
        parameters |= _existing_parameters(graph.graph, plan)
        insert(graph, plan, parameters)

        progress("write", 0.0)
        training = write_training_artifacts(graph, recipe, folder, plan=plan, folding=folding)
        if training.range_states or any(one.training is not None for one in folding.folded):
            # What the eval model computes of the checkpoint, to the bit: it rounds in float32, in its order.
            evaluation = load_from_bundle(folder / bundles.EVAL_MODEL)
            apply_checkpoint(graph, evaluation, read_checkpoint(folder / bundles.CHECKPOINT))
        lower(graph, saturation="before")
        save(graph, folder / bundles.QAT_MODEL)
        progress("write", 0.5)
        written = sorted(path for path in folder.iterdir() if path.is_file())
        manifest = Manifest(
            recipe=recipe,
            source=source,
            calibration=None if calibration is None else bundles.describe(calibration),
            versions=_versions(),
            normalization=Normalization.model_validate(dataclasses.asdict(normalization)),
            quantizers=sections.quantizers(plan, parameters, training),
            quantized_nodes=plan.quantized_nodes,
            folded=sections.folded(folding, training.statistics),
            batch_norms=sections.batch_norms(folding, recipe),
            skipped=sections.skipped(plan, folding),
            frozen=sections.frozen(training),
            training=sections.training(training, recipe.step_counter),
            warnings=(
                *sections.false_shape(false_shape),
                *sections.warnings(normalization, plan, parameters, training),
                *sections.training_mode(folding),
                *sections.ineffective_freeze(folding, recipe),
            ),
            files=tuple(bundles.describe_file(path) for path in written),
        )
        (folder / bundles.MANIFEST).write_bytes(manifest.to_json())
        _require_loads(folder, model)
        progress("write", 1.0)
    return manifest


def _require_loads(folder: pathlib.Path, model: pathlib.Path) -> None:
    """Raise `run_failed` if the stock API does not load the bundle."""
    try:
        open_session(folder, trial=True)
    except QatError as error:
        try:
            inference.open_session(model, inference.session_options(optimize=False))
        except QatError as own:
            raise QatError(
                ErrorCode.RUN_FAILED,
                f"Neither the model nor its bundle can be run: {own.message}",
                node=own.node or error.node,
                file=model.name,
            ) from own
        raise


def _source(model: pathlib.Path, external_data: list[str]) -> Source:
    files = tuple(bundles.describe_file(model.parent / name, name) for name in external_data)
    return Source(**dict(bundles.describe(model)), external_data=files)


def _existing_parameters(graph: ir.Graph, plan: Plan) -> dict[str, QuantizerParameters]:
    """The scales that the model came with."""
    found = {}
    for quantizer in plan.quantizers:
        if quantizer.existing:
            scale = graph.initializers[quantizer.scale_name].const_value
            zero_point = graph.initializers[quantizer.zero_point_name].const_value
            assert scale is not None
            assert zero_point is not None
            found[quantizer.name] = QuantizerParameters(scale.numpy(), zero_point.numpy(), "existing")
    return found


def _versions() -> dict[str, str]:
    """What the bundle's bytes depend on."""
    packages = ("onnx-qat", "onnx", "onnx-ir", "numpy")
    return {name: importlib.metadata.version(name) for name in packages} | {
        "onnxruntime-training": onnxruntime.__version__
    }
