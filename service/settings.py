"""Everything an operator can set, read from the environment (prefix ONNX_QAT_)."""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    RedisDsn,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX: Final = "ONNX_QAT_"

# Far beyond what anybody needs, and well within what dates, clocks, the kernel and the database take.
LONGEST_RETENTION_DAYS: Final = 36_500
_YEAR_SECONDS: Final = 365 * 86_400
_MOST_BYTES: Final = 1 << 60


PositiveSeconds = Annotated[float, Field(gt=0, le=_YEAR_SECONDS, allow_inf_nan=False)]
NonNegativeSeconds = Annotated[float, Field(ge=0, le=_YEAR_SECONDS, allow_inf_nan=False)]
PositiveBytes = Annotated[ByteSize, Field(gt=0, le=_MOST_BYTES)]
NonNegativeBytes = Annotated[ByteSize, Field(ge=0, le=_MOST_BYTES)]
Port = Annotated[int, Field(ge=1, le=65535)]


class AuthMode(enum.StrEnum):
    """Who may use the service."""

    OPEN = "open"
    """Whoever reaches it; everything belongs to the tenant "default"."""
    KEYS = "keys"
    """Whoever has an API key; everything belongs to the key's tenant."""


def _host_names(value: object) -> object:
    """Names with commas between them, as the environment has them."""
    if not isinstance(value, str):
        return value
    return [name.strip().lower() for name in value.split(",") if name.strip()]


def _decoded(value: object) -> object:
    """A list as the environment has it, in JSON; what is no JSON is no list either."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _postgresql(url: str) -> str:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        is_postgresql = make_url(url).drivername in ("postgresql", "postgresql+psycopg")
    except (ArgumentError, ValueError):
        is_postgresql = False
    if not is_postgresql:
        raise ValueError(
            "this is no address of a PostgreSQL database; write postgresql://USER:PASSWORD@HOST/DATABASE, or "
            "nothing for SQLite in the data directory"
        )
    return url


def _numbered(url: RedisDsn) -> RedisDsn:
    """Celery fails at a database that is no number, and redis-py takes 0 in its place."""
    if not re.fullmatch(r"(/[0-9]*)?", url.path or ""):
        raise ValueError("this names no database of Redis; write redis://HOST:PORT/NUMBER")
    return url


RedisUrl = Annotated[RedisDsn, AfterValidator(_numbered)]
HostNames = Annotated[frozenset[str], NoDecode, BeforeValidator(_host_names)]
Listed = (NoDecode, BeforeValidator(_decoded))


class Settings(BaseSettings):
    """Settings of one service process.

    Sizes take units ("512MiB") or plain bytes, `null` stands for none. An empty variable is as good as none:
    Compose passes on what is not set in that way.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_parse_none_str="null", env_ignore_empty=True, frozen=True
    )

    data_dir: Path = Field(default=Path("onnx-qat-data"), description="database, uploads and results")
    database_url: Annotated[str, AfterValidator(_postgresql)] | None = Field(
        default=None,
        description="postgresql://USER:PASSWORD@HOST/DATABASE; without it SQLite in the data directory",
    )
    store_url: str | None = Field(
        default=None,
        pattern=r"^s3://[^/]+(/.*)?$",
        description="s3://BUCKET/PREFIX for uploads and results; without it the data directory",
    )
    store_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]+/?$",
        description="http(s)://HOST:PORT of an S3-compatible server that is not Amazon's",
    )
    store_public_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]+$",
        description="the same for clients, where they reach that server at another address; for presigned "
        "downloads",
    )
    store_region: str | None = Field(
        default=None, description="region of the bucket; without it AWS_REGION, or us-east-1"
    )
    presigned_downloads: bool = Field(
        default=False, description="send clients to the S3 store for downloads (307)"
    )
    presigned_seconds: int = Field(
        default=600, ge=1, le=604800, description="how long such an address is valid"
    )

    auth: AuthMode | None = Field(
        default=None,
        description="open or keys; without it open, and refused at an address that others can reach",
    )
    allowed_hosts: HostNames = Field(
        default=frozenset(),
        description="host names, with commas, that open mode answers to beside localhost and IP addresses",
    )
    metrics_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="bearer token that /metrics asks for; without it nobody reads them where keys are needed",
    )
    redis_url: RedisUrl | None = Field(
        default=None,
        description="redis://HOST:PORT/NUMBER where several API processes share their rate limits",
    )

    max_upload_bytes: PositiveBytes = Field(default=ByteSize(4 << 30), description="one upload request")
    max_uploads_at_once: int = Field(
        default=256, ge=1, le=100_000, description="uploads that are received at the same time; 503 for more"
    )
    max_event_streams: int = Field(
        default=100,
        ge=1,
        le=100_000,
        description="jobs that a tenant follows at the same time, at each API process; 429 for more",
    )
    upload_timeout_seconds: PositiveSeconds = Field(
        default=60, description="time in which 64 KiB more of a request's body must arrive, or its end"
    )
    resumable_upload_seconds: int = Field(
        default=86400,
        ge=1,
        le=_YEAR_SECONDS,
        description="how long an unfinished resumable upload is kept after it last grew",
    )
    max_upload_files: int = Field(default=256, ge=1, le=100_000, description="files in one multipart upload")
    max_request_bytes: PositiveBytes = Field(
        default=ByteSize(1 << 20), description="a JSON body, or a text field of a multipart upload"
    )

    reserved_bytes: NonNegativeBytes = Field(
        default=ByteSize(64 << 20),
        description="disk space that uploads and jobs leave free, for the database on a disk that is full",
    )

    workers: int = Field(
        default=1,
        ge=0,
        le=256,
        description="jobs that a process runs at the same time; 0 for an API beside `onnx-qat worker`",
    )
    queue: Literal["embedded", "celery"] = Field(
        default="embedded",
        description="how workers learn of jobs: they look into the database, or wait for Celery's messages",
    )
    broker_url: RedisUrl | None = Field(default=None, description="redis://HOST:PORT/NUMBER for Celery")
    lease_seconds: PositiveSeconds = Field(
        default=30, ge=1, description="a running job whose worker shows no life for so long is queued again"
    )
    max_attempts: int = Field(
        default=3, ge=1, le=1000, description="a job fails when it has lost its worker this many times"
    )
    job_timeout_seconds: PositiveSeconds = Field(default=3600, description="wall-clock time of one job")
    job_cpu_seconds: int | None = Field(
        default=None, gt=0, le=_YEAR_SECONDS, description="CPU time of one job, all threads"
    )
    job_memory_bytes: PositiveBytes | None = Field(
        default=ByteSize(16 << 30), description="address space of a job's process"
    )
    job_file_bytes: PositiveBytes | None = Field(
        default=ByteSize(16 << 30), description="largest file that a job may write"
    )

    job_open_files: int | None = Field(
        default=1024, ge=64, le=1 << 20, description="file descriptors of one job"
    )
    job_threads: int | None = Field(default=1024, ge=1, le=1 << 22, description="threads of one job")
    job_scratch_bytes: PositiveBytes | None = Field(
        default=ByteSize(64 << 30), description="disk space of all files that a job writes"
    )
    job_scratch_files: int | None = Field(
        default=10_000, ge=1, le=1 << 30, description="files and directories that a job makes"
    )
    job_isolation: Literal["available", "required"] = Field(
        default="available",
        description="how a job's process is kept from files, network and other processes: as far as this "
        "kernel can, or in full, else the service does not start",
    )

    retention_days: float | None = Field(
        default=None,
        gt=0,
        le=LONGEST_RETENTION_DAYS,
        allow_inf_nan=False,
        description="how long a finished job and its files are kept, and an upload that no job needs; "
        "none: for ever. On PostgreSQL: as it was set before, `null` for ever",
    )

    webhook_allow_private: bool = Field(
        default=False, description="let webhooks go to private and loopback addresses"
    )
    webhook_ports: Annotated[frozenset[Port] | None, *Listed] = Field(
        default=frozenset({80, 443, 8080, 8443}), description="ports that webhooks may go to; none: all"
    )
    webhook_timeout_seconds: PositiveSeconds = Field(default=10, description="one attempt at a webhook")
    webhook_retry_seconds: Annotated[tuple[NonNegativeSeconds, ...], *Listed] = Field(
        default=(5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800, 28800),
        description="time before each further attempt at a webhook, a fifth more or less by chance",
    )

    shutdown_grace_seconds: NonNegativeSeconds = Field(
        default=20,
        description="time in which running jobs and requests may finish after SIGTERM; jobs that do not are "
        "queued again",
    )
    metrics_port: Port | None = Field(
        default=None,
        description="port for metrics alone, of `serve` and of `worker`; without a key, so keep it private",
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of that port")

    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _celery_has_servers(self) -> Settings:
        if self.queue == "celery" and (self.broker_url is None or self.database_url is None):
            raise ValueError(
                "ONNX_QAT_QUEUE=celery needs ONNX_QAT_BROKER_URL and ONNX_QAT_DATABASE_URL (PostgreSQL)."
            )
        return self
