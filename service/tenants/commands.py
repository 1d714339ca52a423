"""`onnx-qat tenants ...` and `onnx-qat keys ...`: for whoever runs the service, beside its database."""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError

from service.options import DataDirOption, errors_to_exit_status, require_database, settings_with

if TYPE_CHECKING:
    from service.tenants.service import TenantService

tenants = typer.Typer(help="The tenants of the service and their quotas.", no_args_is_help=True)
keys = typer.Typer(help="API keys, each of which stands for a tenant.", no_args_is_help=True)

_TENANT_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NO_LIMIT: Final = "none"


def _tenant_id(value: str) -> str:
    if _TENANT_ID.fullmatch(value) is None:
        raise typer.BadParameter("up to 32 small letters, digits and hyphens")
    return value


def _lifetime(value: str) -> datetime.timedelta:
    match = re.fullmatch(r"([1-9][0-9]{0,3})([mhdw])", value)
    if match is None:
        raise typer.BadParameter("up to four digits and m, h, d or w: 90d")
    return datetime.timedelta(**{_UNITS[match[2]]: int(match[1])})


def _size(value: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError as error:
        raise ValueError("bytes with or without a unit (10GiB), or none") from error


def _number(value: str) -> int:
    if not value.isdecimal():
        raise ValueError("a number, or none")
    return int(value)


# How each quota is read, and what it may be: as much as the database's integers hold.
_QUOTAS: Final[dict[str, tuple[Callable[[str], int], range]]] = {
    "max_bytes": (_size, range(2**63)),
    "max_queued_jobs": (_number, range(2**31)),
    "requests_per_minute": (_number, range(1, 2**31)),
}

TenantArgument = Annotated[str, typer.Argument(help="Id of the tenant.")]
MaxBytesOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Uploads and results that are stored: 10GiB.")
]
MaxQueuedJobsOption = Annotated[
    str | None, typer.Option(metavar="NUMBER", help="Jobs that are queued or running.")
]
RequestsPerMinuteOption = Annotated[str | None, typer.Option(metavar="NUMBER", help="Requests to /v1.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


@tenants.command("create")
def create_tenant(
    tenant: Annotated[str, typer.Argument(help="Id of the new tenant: team-a.", callback=_tenant_id)],
    name: Annotated[str | None, typer.Option(help="Name for people.", show_default="the id")] = None,
    max_bytes: MaxBytesOption = None,
    max_queued_jobs: MaxQueuedJobsOption = None,
    requests_per_minute: RequestsPerMinuteOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a tenant. A quota that is not given is not limited."""
    from service.tenants.schemas import Quotas

    limits = _changes(
        max_bytes=max_bytes, max_queued_jobs=max_queued_jobs, requests_per_minute=requests_per_minute
    )
    with _service(data_dir) as service:
        service.create(tenant, (name or tenant)[:200], Quotas(**limits))


@tenants.command("list")
def list_tenants(as_json: JsonOption = False, data_dir: DataDirOption = None) -> None:
    """Show all tenants and their quotas."""
    with _service(data_dir) as service:
        rows = service.tenants()
    _show(rows, ("id", "max_bytes", "max_queued_jobs", "requests_per_minute", "name"), as_json)


@tenants.command("set-quota")
def set_quota(
    tenant: TenantArgument,
    max_bytes: MaxBytesOption = None,
    max_queued_jobs: MaxQueuedJobsOption = None,
    requests_per_minute: RequestsPerMinuteOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Change quotas; `none` takes one away, and what is not given stays."""
    changes = _changes(
        max_bytes=max_bytes, max_queued_jobs=max_queued_jobs, requests_per_minute=requests_per_minute
    )
    if not changes:
        raise typer.BadParameter("give at least one quota")
    with _service(data_dir) as service:
        service.set_quotas(tenant, changes)


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Id of the tenant that the key stands for.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    expires: Annotated[
        datetime.timedelta | None,
        typer.Option(parser=_lifetime, metavar="TIME", help="Ends after that time: 12h, 90d, 52w."),
    ] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make an API key and print it, this once: only its hash is kept."""
    with _service(data_dir) as service:
        _, key = service.create_key(tenant, name[:200], expires)
    print(key.text)


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only the keys of this tenant.")] = None,
    as_json: JsonOption = False,
    data_dir: DataDirOption = None,
) -> None:
    """Show all keys, without their secrets."""
    with _service(data_dir) as service:
        rows = service.api_keys(tenant)
    _show(rows, ("id", "tenant", "created_at", "expires_at", "revoked_at", "last_used_at", "name"), as_json)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Id of the key, as `keys list` shows it.")],
    data_dir: DataDirOption = None,
) -> None:
    """End a key at once."""
    with _service(data_dir) as service:
        service.revoke(key)


@contextmanager
def _service(data_dir: Path | None) -> Iterator[TenantService]:
    """Tenants in the database of the settings; the service may be running."""
    from service.database import Database
    from service.logs import configure_logs
    from service.storage.directory import DataDirectory
    from service.tenants.service import TenantService

    settings = settings_with(data_dir=data_dir)
    configure_logs(settings)
    if settings.database_url is not None:
        require_database(settings)
    data = DataDirectory(settings.data_dir)
    database = Database(settings.database_url or data.database_url)
    try:
        if database.is_sqlite:
            # A service that holds the directory has brought its database up to date.
            with suppress(BlockingIOError), data.locked():
                database.migrate()
        else:
            database.migrate()
        with errors_to_exit_status():
            yield TenantService(database)
    finally:
        database.close()


def _changes(**given: str | None) -> dict[str, int | None]:
    """The quotas that were given; None for one that shall be without limit."""
    changes: dict[str, int | None] = {}
    for name, text in given.items():
        if text is not None:
            read, allowed = _QUOTAS[name]
            changes[name] = None if text == _NO_LIMIT else _read(name, text, read, allowed)
    return changes


def _read(name: str, text: str, read: Callable[[str], int], allowed: range) -> int:
    option = "--" + name.replace("_", "-")
    try:
        value = read(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    if value not in allowed:
        raise typer.BadParameter(f"from {allowed.start} to {allowed.stop - 1}", param_hint=option)
    return value


def _show(rows: Sequence[BaseModel], fields: Sequence[str], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(row.model_dump_json())
        return
    lines = [list(fields), *([_cell(getattr(row, field)) for field in fields] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def _cell(value: object) -> str:
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%d %H:%MZ")
    return "-" if value is None else str(value)
