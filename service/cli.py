"""The command line: the library's commands and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import app

__all__ = ["app"]

# After this time an open connection (somebody follows a job's events) no longer holds up the end.
_GRACEFUL_SECONDS = 5


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where uploads, jobs and results are kept.", show_default="onnx-qat-data"),
    ] = None,
) -> None:
    """Serve the HTTP API. Further settings come from the environment (ONNX_QAT_...)."""
    # Imported late: the other commands need nothing of the web framework.
    import uvicorn

    from service.app import create_app
    from service.settings import Settings

    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    uvicorn.run(
        create_app(settings),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
