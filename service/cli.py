"""The command line: the library's commands, `serve`, and the client's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import app
from service.client_cli import app as client_commands
from service.options import (
    DataDirOption,
    errors_to_exit_status,
    require_database,
    require_isolation,
    require_metrics_port,
    settings_with,
)
from service.settings import AuthMode
from service.tenants import commands

__all__ = ["app"]

app.add_typer(client_commands)

app.add_typer(commands.tenants, name="tenants")
app.add_typer(commands.keys, name="keys")


@app.command()
def isolation() -> None:
    """Say how the service keeps jobs in their place on this machine; exit status 1 if not in full."""
    from service.worker.isolation import probe

    found = probe()
    for name, active in dataclasses.asdict(found).items():
        print(f"{name:10} {'active' if active else 'missing'}")
    for sentence in found.missing:
        print(sentence)
    if found.missing:
        raise typer.Exit(1)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    auth: Annotated[
        AuthMode | None,
        typer.Option(help="Who may use it.", show_default="open, only at addresses of this machine"),
    ] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Serve the HTTP API. Further settings come from the environment (ONNX_QAT_...)."""
    # Imported late: the other commands need nothing of the web framework.
    from service import server
    from service.access.binding import check_binding

    settings = settings_with(data_dir=data_dir, auth=auth)
    with errors_to_exit_status(2):
        check_binding(settings, host)
    require_database(settings)
    require_metrics_port(settings)
    if settings.queue == "embedded":  # else no job runs here
        require_isolation(settings)
    server.serve(settings, host=host, port=port)


@app.command()
def worker(
    data_dir: DataDirOption = None,
    alive_file: Annotated[
        Path | None,
        typer.Option(help="A file to touch every 5 seconds while all is well, for health checks."),
    ] = None,
) -> None:
    """Run jobs without the HTTP API, beside others; needs PostgreSQL (ONNX_QAT_DATABASE_URL)."""
    from service.worker.command import check_worker, run_workers

    settings = settings_with(data_dir=data_dir)
    with errors_to_exit_status(2):
        check_worker(settings)
    require_database(settings)
    require_metrics_port(settings)
    require_isolation(settings)
    raise typer.Exit(run_workers(settings, alive_file))


@app.command()
def migrate(data_dir: DataDirOption = None) -> None:
    """Bring the service's database up to date. `serve` does that too, at its start."""
    from service.services import Services

    settings = settings_with(data_dir=data_dir)
    require_database(settings)
    with Services.of(settings).opened():
        pass
