"""`onnx-qat submit`, `watch`, `download` and so on: the client from the command line.

Exit status: 0 done; 1 the job failed or was cancelled, or the service refuses (one line on standard error,
with the code that the local command prints); 2 wrong usage, a wrong recipe included; 3 the service does not
answer, or something else does; 130 stopped by Ctrl-C, while the job goes on.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from rewriter.cli import USAGE_ERRORS, errors_to_exit_status, read_recipe
from rewriter.watching import progress_bar
from service.jobs.states import JobKind, JobState

if TYPE_CHECKING:  # the other commands need nothing of the client
    from service.client import Client, JobSummary

app = typer.Typer()

_PANEL: Final = "Through a service"
_UNREACHABLE: Final = 3
_INTERRUPTED: Final = 130
_USAGE_CODES: Final = frozenset({*USAGE_ERRORS, "request_invalid"})

Server = Annotated[
    str,
    typer.Option(
        envvar="ONNX_QAT_SERVER", help="Address of the service. The API key comes from ONNX_QAT_API_KEY."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON: one line for each job, again after each change of it.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Wait for the end of the job.")]


def _job_id(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", value):
        raise typer.BadParameter("this is no job's id, which has 32 hexadecimal digits; see onnx-qat jobs")
    return value


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.", callback=_job_id)]
_LOCAL: Final = "http://127.0.0.1:8000"


@app.command(rich_help_panel=_PANEL)
def submit(
    model: Annotated[pathlib.Path, typer.Argument(help="Float ONNX file.")],
    recipe: Annotated[pathlib.Path | None, typer.Option(help="Recipe as a JSON file.")] = None,
    calibration: Annotated[
        pathlib.Path | None, typer.Option(help="npz: one array per graph input, first axis = samples.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Recipe field, JSON value; wins over --recipe."),
    ] = None,
    external_data: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="File that holds tensors of the model.", show_default="those that the model names"),
    ] = None,
    watch: Watch = False,
    as_json: AsJson = False,
    server: Server = _LOCAL,
) -> None:
    """Have the service prepare a model. The files are uploaded unless it has them already."""
    with _client(server) as client:
        chosen = read_recipe(recipe, settings or [])
        with progress_bar() as progress:
            job = client.prepare(
                model,
                recipe=chosen,
                calibration=calibration,
                external_data=external_data or None,
                progress=progress,
            )
        _submitted(client, job, server, watch=watch, as_json=as_json)


@app.command("submit-finalize", rich_help_panel=_PANEL)
def submit_finalize(
    prepare_job: Annotated[
        str, typer.Argument(metavar="JOB", help="Id of the job that made the bundle.", callback=_job_id)
    ],
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="Trained checkpoint; default: the bundle's own.")
    ] = None,
    verify: Annotated[
        pathlib.Path | None, typer.Option(help="npz: compare the int8 model with the trained one on it.")
    ] = None,
    watch: Watch = False,
    as_json: AsJson = False,
    server: Server = _LOCAL,
) -> None:
    """Have the service make the int8 model of a bundle that it prepared and a checkpoint."""
    with _client(server) as client:
        with progress_bar() as progress:
            job = client.finalize(prepare_job, checkpoint=checkpoint, verify=verify, progress=progress)
        _submitted(client, job, server, watch=watch, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def watch(job: JobArgument, as_json: AsJson = False, server: Server = _LOCAL) -> None:
    """Wait for the end of a job. Ctrl-C ends the waiting, not the job."""
    with _client(server) as client:
        _watch(client, job, server, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def download(
    job: JobArgument,
    output: Annotated[
        pathlib.Path | None,
        typer.Option(
            "-o", "--output", help="Directory to make, or a .zip for a bundle.", show_default="./JOB"
        ),
    ] = None,
    as_json: AsJson = False,
    server: Server = _LOCAL,
) -> None:
    """Get what a job made: its bundle, or the int8 model and the report on it.

    What was interrupted goes on where it was when the same command is given again.
    """
    with _client(server) as client:
        with progress_bar() as progress:
            path = client.download_bundle(job, output or pathlib.Path(job), progress=progress)
        if as_json:
            print(json.dumps({"job": job, "output": str(path)}))
        else:
            print(path)


@app.command(rich_help_panel=_PANEL)
def jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 20,
    as_json: AsJson = False,
    server: Server = _LOCAL,
) -> None:
    """List jobs, the newest first."""
    with _client(server) as client:
        for _, job in zip(range(limit), client.jobs(state=state), strict=False):
            print(job.model_dump_json() if as_json else f"{job.created_at:%Y-%m-%d %H:%M:%S}  {_line(job)}")


@app.command(rich_help_panel=_PANEL)
def cancel(job: JobArgument, as_json: AsJson = False, server: Server = _LOCAL) -> None:
    """Cancel a job that has not finished."""
    with _client(server) as client:
        cancelled = client.cancel(job)
        print(cancelled.model_dump_json() if as_json else _line(cancelled))


@app.command(rich_help_panel=_PANEL)
def retry(job: JobArgument, watch: Watch = False, as_json: AsJson = False, server: Server = _LOCAL) -> None:
    """Do the work of a failed or cancelled job again, as a new job."""
    with _client(server) as client:
        _submitted(client, client.retry(job), server, watch=watch, as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def delete(job: JobArgument, as_json: AsJson = False, server: Server = _LOCAL) -> None:
    """Remove a finished job and its files from the service."""
    with _client(server) as client:
        client.delete_job(job)
        print(json.dumps({"job": job, "deleted": True}) if as_json else f"{job}  deleted")


@contextlib.contextmanager
def _client(server: str) -> Iterator[Client]:
    """A client; what goes wrong with it becomes the exit status."""
    from service.client import ApiError, Client, ClientError, JobFailed, UnreachableError

    with errors_to_exit_status():
        try:
            with Client(server) as client:
                yield client
        except UnreachableError as error:
            _fail(error, _UNREACHABLE)
        except (ApiError, JobFailed) as error:
            _fail(error, 2 if error.code in _USAGE_CODES else 1)
        except ClientError as error:
            _fail(error, 1)
        except KeyboardInterrupt as error:
            raise typer.Exit(_INTERRUPTED) from error


def _fail(error: Exception, status: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(status) from error


def _submitted(client: Client, job: JobSummary, server: str, *, watch: bool, as_json: bool) -> None:
    if watch:
        _watch(client, job.id, server, as_json=as_json)
    else:
        print(job.model_dump_json() if as_json else _line(job))


def _watch(client: Client, job_id: str, server: str, *, as_json: bool) -> None:
    from service.client import JobFailed

    try:
        with progress_bar() as progress:
            for job in client.watch(job_id):
                if as_json:
                    print(job.model_dump_json(), flush=True)
                if job.progress.stage is not None:
                    progress(job.progress.stage, job.progress.fraction)
    except KeyboardInterrupt:
        where = "" if server == _LOCAL else f" --server {server}"
        print(f"the job goes on; to watch it again: onnx-qat watch {job_id}{where}", file=sys.stderr)
        raise
    if job.state is not JobState.SUCCEEDED:
        raise JobFailed(job)
    if not as_json:
        print(_line(job))


def _line(job: JobSummary) -> str:
    """A job in one line."""
    what = job.state.value
    if job.state is JobState.RUNNING and job.progress.stage is not None:
        what += f", {job.progress.stage} {job.progress.fraction:.0%}"
    if job.failure is not None:
        what += f": {job.failure.code}"
    return f"{job.id}  {job.kind:<{_KIND_WIDTH}}  {what}"


_KIND_WIDTH: Final = max(len(kind) for kind in JobKind)
