"""What the service's commands have in common: the option for the data directory, and settings with it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from service.settings import Settings

DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Where uploads, jobs and results are kept.", show_default="onnx-qat-data"),
]


def settings_with(**options: Any) -> Settings:
    """The environment's settings, with the options that were given on the command line."""
    # Imported late: the library's commands need nothing of the service.
    from pydantic import ValidationError

    from service.errors import ServiceErrorCode
    from service.settings import Settings

    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False):
            print(f"error: {ServiceErrorCode.SETTING_INVALID}: {_sentence(wrong)}", file=sys.stderr)
        raise typer.Exit(2) from error


# What to write, where pydantic's own words leave it open.
_WRITE: Final = {
    "int_parsing": "this is no whole number",
    "float_parsing": "this is no number",
    "bool_parsing": "write true or false",
    "byte_size": "this is no size; write bytes, with or without a unit, as 512MiB",
    "byte_size_unit": "this is no unit of a size; write bytes, with or without a unit, as 512MiB",
    "too_short": "this is too short; write at least {min_length} characters",
    "frozen_set_type": "this is no list; write one in brackets, as [80,443]",
    "tuple_type": "this is no list; write one in brackets, as [5,30]",
}


def _sentence(error: ErrorDetails) -> str:
    """What is wrong with a setting, by the name of its variable, and what to write; without its value, which
    may be secret."""
    from service.settings import PREFIX, Settings

    problem = error["msg"].removeprefix("Value error, ")
    if error["type"] in _WRITE:
        problem = _WRITE[error["type"]].format(**error.get("ctx", {}))
    if not error["loc"]:  # of several settings together, which it names
        return problem
    field, *inner = map(str, error["loc"])
    where = f"{PREFIX}{field.upper()}" + "".join(f"[{part}]" for part in inner if part.isdecimal())
    told = Settings.model_fields[field]
    if error["type"] == "string_pattern_mismatch":
        problem = f"this is no such address; it takes {told.description}"
    elif error["type"] in ("int_parsing", "float_parsing") and told.description:
        problem = f"{problem}; it is for: {told.description}"
    return f"{where}: {problem}."


def require_database(settings: Settings) -> None:
    """End the command with one line where its work could not even begin: with a server that is not there, or
    in a data directory that another process holds.

    What happens to them later is another matter: then the service waits for them.
    """
    from sqlalchemy.exc import OperationalError

    from service.database import Database
    from service.errors import ServiceError, ServiceErrorCode
    from service.storage.directory import DataDirectory

    with errors_to_exit_status():
        if settings.database_url is None:
            try:
                with DataDirectory(settings.data_dir).locked():
                    return
            except BlockingIOError as error:
                raise ServiceError(
                    ServiceErrorCode.DATA_DIRECTORY_IN_USE,
                    f"Another process uses the data directory {settings.data_dir}; end it, or choose another "
                    "directory with --data-dir or ONNX_QAT_DATA_DIR.",
                ) from error
        database = Database(settings.database_url)
        try:
            database.check()
        except OperationalError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            raise ServiceError(
                ServiceErrorCode.DATABASE_UNAVAILABLE,
                f"The database of ONNX_QAT_DATABASE_URL cannot be used: {reason}",
            ) from error
        finally:
            database.close()


def require_metrics_port(settings: Settings) -> None:
    """End the command with one line where another process has the port for metrics, or the address is none of
    this machine's."""
    from service.errors import ServiceError, ServiceErrorCode

    if settings.metrics_port is None:
        return
    host, port = settings.metrics_host, settings.metrics_port
    with errors_to_exit_status():
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            socket.create_server(address[:2], family=family).close()
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ServiceError(
                ServiceErrorCode.METRICS_PORT_UNAVAILABLE,
                f"Port {port} of {host} (ONNX_QAT_METRICS_PORT, ONNX_QAT_METRICS_HOST) cannot be used: "
                + str(reason).partition(" (while")[0],
            ) from error


def require_isolation(settings: Settings) -> None:
    """End the command with one line where jobs must be isolated and this machine cannot do it."""
    from service.errors import ServiceError, ServiceErrorCode
    from service.worker.isolation import IsolationUnavailableError, probe

    if settings.job_isolation != "required" or not settings.workers:
        return
    with errors_to_exit_status(2):
        if missing := probe().missing:
            raise ServiceError(
                ServiceErrorCode.SETTING_INVALID,
                str(IsolationUnavailableError(missing)),
                field="job_isolation",
            )


@contextmanager
def errors_to_exit_status(status: int = 1) -> Iterator[None]:
    """End the command with that status and one line on standard error for what the service refuses."""
    from service.errors import ServiceError

    try:
        yield
    except ServiceError as error:
        print(f"error: {error.cause.code}: {error.cause.detail}", file=sys.stderr)
        raise typer.Exit(status) from error
