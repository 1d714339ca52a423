"""`onnx-qat`: the library from the command line.

Exit status: 0 done; 1 the model or the data cannot be processed (one line on standard error: reason, code,
node); 2 wrong usage, a wrong recipe included; 128 + signal: `finetune` was stopped and can be resumed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

import rewriter
from rewriter.errors import ErrorCode, QatError
from rewriter.installation import Device
from rewriter.watching import interruptible, progress_bar, training_log

app = typer.Typer(
    help="Quantization-aware training for ONNX files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

USAGE_ERRORS: Final = frozenset(
    {ErrorCode.RECIPE_INVALID, ErrorCode.RECIPE_UNSUPPORTED, ErrorCode.ARGUMENT_INVALID}
)


@app.command()
def prepare(
    model: Annotated[pathlib.Path, typer.Argument(help="Float ONNX file.")],
    output: Annotated[pathlib.Path, typer.Option("-o", "--output", help="Bundle directory to make.")],
    recipe: Annotated[pathlib.Path | None, typer.Option(help="Recipe as a JSON file.")] = None,
    calibration: Annotated[
        pathlib.Path | None, typer.Option(help="npz: one array per graph input, first axis = samples.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Recipe field, JSON value; wins over --recipe."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Turn a float model into a bundle that trains with stock onnxruntime-training."""
    with errors_to_exit_status():
        chosen = read_recipe(recipe, settings or [])
        with progress_bar() as progress:
            manifest = rewriter.prepare(
                model, output, recipe=chosen, calibration=calibration, replace=force, progress=progress
            )
        weights = sum(q.kind == "weight" for q in manifest.quantizers)
        print(
            f"{output}: {len(manifest.quantized_nodes)} nodes quantized with {weights} weight and "
            f"{len(manifest.quantizers) - weights} activation quantizers, {len(manifest.folded)} batch norms "
            f"folded, {len(manifest.skipped)} nodes skipped, {len(manifest.training.trainable)} parameters "
            "to train"
        )
        for warning in manifest.warnings:
            print(f"warning: {warning}", file=sys.stderr)


@app.command()
def finetune(
    bundle: Annotated[pathlib.Path, typer.Argument(help="Bundle directory.")],
    data: Annotated[pathlib.Path, typer.Option(help="npz: graph inputs and labels/targets.")],
    evaluation: Annotated[pathlib.Path | None, typer.Option("--eval", help="npz to evaluate on.")] = None,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("-o", "--output", help="Checkpoint to write.", show_default="BUNDLE/trained_checkpoint"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr", help="The largest; falls to 0 along a cosine.", show_default="adamw 1e-3, sgd 5e-2"
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps in which the rate rises to that.")] = 0,
    device: Annotated[Device, typer.Option()] = "cpu",
    seed: Annotated[int, typer.Option(help="Order of the samples.")] = 0,
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="Start a new run from its weights; default: the bundle's own.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, to the same result.")
    ] = False,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two resumable checkpoints; default: none.")
    ] = None,
    state: Annotated[
        pathlib.Path | None,
        typer.Option(help="The resumable checkpoint.", show_default="BUNDLE/training_state"),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two evaluations; default: every epoch.")
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between two log lines.")] = 50,
    log: Annotated[
        pathlib.Path | None, typer.Option(help="File for the log as JSON lines; --resume appends to it.")
    ] = None,
) -> None:
    """Train a bundle with onnxruntime-training, into the bundle's trained_checkpoint.

    Ctrl-C and SIGTERM end it after the current step, with a checkpoint that --resume goes on from; the exit
    status is then 130 or 143.
    """
    with errors_to_exit_status(), interruptible() as stop:
        try:
            with training_log(log, append=resume) as (progress, write):
                report = rewriter.finetune(
                    bundle,
                    data,
                    evaluation=evaluation,
                    epochs=epochs,
                    batch_size=batch_size,
                    accumulate=accumulate,
                    learning_rate=learning_rate,
                    warmup=warmup,
                    device=device,
                    seed=seed,
                    checkpoint=checkpoint,
                    checkpoint_out=output,
                    resume=resume,
                    save_every=save_every,
                    training_state=state,
                    eval_every=eval_every,
                    log_every=log_every,
                    log=write,
                    stop=stop,
                    progress=progress,
                )
        except QatError as error:
            if error.code != ErrorCode.TRAINING_INTERRUPTED or stop.signal is None:
                raise
            print(error, file=sys.stderr)
            raise typer.Exit(128 + stop.signal) from error
        print(report)


@app.command()
def finalize(
    bundle: Annotated[pathlib.Path, typer.Argument(help="Bundle directory.")],
    output: Annotated[pathlib.Path, typer.Option("-o", "--output", help="int8 ONNX file to make.")],
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="Trained checkpoint; default: the bundle's own.")
    ] = None,
    verify: Annotated[
        pathlib.Path | None, typer.Option(help="npz: compare the int8 model with the trained one on it.")
    ] = None,
) -> None:
    """Turn a bundle and a checkpoint into an int8 model for stock onnxruntime."""
    with errors_to_exit_status():
        with progress_bar() as progress:
            report = rewriter.finalize(
                bundle, output, checkpoint=checkpoint, verify=verify, progress=progress
            )
        print(report.summary())
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)


def read_recipe(path: pathlib.Path | None, settings: list[str]) -> rewriter.Recipe:
    """The recipe of a JSON file, with single fields set over it (FIELD=VALUE)."""
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise QatError(
                ErrorCode.RECIPE_INVALID, f"The recipe cannot be read as JSON: {error}.", file=str(path)
            ) from error
        if not isinstance(loaded, dict):
            raise QatError(ErrorCode.RECIPE_INVALID, "The recipe is not a JSON object.", file=str(path))
        fields.update(loaded)
    for setting in settings:
        field, separator, value = setting.partition("=")
        if not separator or not field:
            raise typer.BadParameter(f"{setting!r} is not FIELD=VALUE", param_hint="--set")
        _set(fields, field.split("."), _json_or_text(value))
    return rewriter.Recipe.parse(fields)


def _set(fields: dict[str, Any], path: list[str], value: Any) -> None:
    """`calibration.method` reaches into the section."""
    for part in path[:-1]:
        section = fields.setdefault(part, {})
        if not isinstance(section, dict):
            section = fields[part] = {}
        fields = section
    fields[path[-1]] = value


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


@contextlib.contextmanager
def errors_to_exit_status() -> Iterator[None]:
    """Print an error that the block raises, and exit with its status."""
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        # Samples of a wrong size can crash onnxruntime: say where, not just the shell's word for the signal.
        faulthandler.enable(sys.__stderr__, all_threads=False)
    try:
        yield
    except QatError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if error.code in USAGE_ERRORS else 1) from error
    except OSError as error:  # of the system, not of what it was given: no temporary directory, a bad disk
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
