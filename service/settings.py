"""Everything an operator can set, read from the environment (prefix ONNX_QAT_)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

PositiveBytes = Annotated[ByteSize, Field(gt=0)]


class Settings(BaseSettings):
    """Settings of one service process. Sizes take units ("512MiB", "4GiB") or plain bytes."""

    model_config = SettingsConfigDict(env_prefix="ONNX_QAT_", frozen=True)

    data_dir: Path = Field(default=Path("onnx-qat-data"), description="database, uploads and results")

    max_upload_bytes: PositiveBytes = Field(default=ByteSize(4 << 30), description="one upload request")
    max_upload_files: int = Field(default=256, ge=1, description="files in one multipart upload")
    max_request_bytes: PositiveBytes = Field(
        default=ByteSize(1 << 20), description="a JSON body, or a text field of a multipart upload"
    )

    workers: int = Field(default=1, ge=1, le=256, description="jobs that run at the same time")
    job_timeout_seconds: float = Field(default=3600, gt=0, description="wall-clock time of one job")
    job_cpu_seconds: int | None = Field(default=None, gt=0, description="CPU time of one job, all threads")
    job_memory_bytes: PositiveBytes | None = Field(
        default=ByteSize(16 << 30), description="address space of a job's process"
    )
    job_file_bytes: PositiveBytes | None = Field(
        default=ByteSize(16 << 30), description="largest file that a job may write"
    )

    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
