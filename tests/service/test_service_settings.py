"""What is wrong with a setting, or a server that is not there, is said in a line, before anything begins."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from servers import postgresql_database
from service_helpers import free_port
from typer.testing import CliRunner

from service.cli import app
from service.settings import Settings
from service.storage.directory import DataDirectory

# The variable, a value that it does not take, and words that say what to write.
WRONG = [
    ("WORKERS", "x", "whole number"),
    ("WORKERS", "-1", "greater than or equal to 0"),
    ("MAX_UPLOAD_BYTES", "4XB", "512MiB"),
    ("MAX_UPLOAD_BYTES", "many", "512MiB"),
    ("WEBHOOK_PORTS", "80", "[80,443]"),
    ("WEBHOOK_PORTS", "80,443", "[80,443]"),
    ("WEBHOOK_RETRY_SECONDS", "5", "[5,30]"),
    ("LEASE_SECONDS", "soon", "number"),
    ("PRESIGNED_DOWNLOADS", "maybe", "true or false"),
    ("LOG_FORMAT", "xml", "'console' or 'json'"),
    ("AUTH", "none", "'open' or 'keys'"),
    ("METRICS_TOKEN", "sesame", "at least 16 characters"),
    ("DATABASE_URL", "mysql://user:sesame@host/name", "postgresql://USER:PASSWORD@HOST/DATABASE"),
    ("DATABASE_URL", "postgresql://host:port/name", "postgresql://USER:PASSWORD@HOST/DATABASE"),
    ("DATABASE_URL", "host/name", "postgresql://USER:PASSWORD@HOST/DATABASE"),
    ("STORE_URL", "https://sesame@bucket", "s3://BUCKET/PREFIX"),
    ("STORE_ENDPOINT", "host:9000", "http(s)://HOST:PORT"),
    ("REDIS_URL", "http://host/0", "'redis' or 'rediss'"),
    ("REDIS_URL", "redis://:sesame@host/name", "redis://HOST:PORT/NUMBER"),
    ("BROKER_URL", "amqp://user:sesame@host", "'redis' or 'rediss'"),
    ("BROKER_URL", "redis://:sesame@host/notanumber", "redis://HOST:PORT/NUMBER"),
    ("RETENTION_DAYS", "0", "greater than 0"),
    ("RETENTION_DAYS", "4000000", "less than or equal to 36500"),
    ("RETENTION_DAYS", "1e300", "less than or equal to 36500"),
    ("RETENTION_DAYS", "inf", "finite number"),
    ("RETENTION_DAYS", "nan", "finite number"),
    ("LEASE_SECONDS", "inf", "finite number"),
    ("LEASE_SECONDS", "1e-9", "greater than or equal to 1"),
    ("SHUTDOWN_GRACE_SECONDS", "inf", "finite number"),
    ("JOB_TIMEOUT_SECONDS", "1e300", "less than or equal to 31536000"),
    ("JOB_CPU_SECONDS", "9" * 20, "less than or equal to 31536000"),
    ("UPLOAD_TIMEOUT_SECONDS", "nan", "finite number"),
    ("RESUMABLE_UPLOAD_SECONDS", "99999999999999", "less than or equal to 31536000"),
    ("WEBHOOK_TIMEOUT_SECONDS", "inf", "finite number"),
    ("MAX_UPLOAD_BYTES", "9999999EiB", "less than or equal to 1152921504606846976"),
    ("RESERVED_BYTES", "9" * 30, "less than or equal to 1152921504606846976"),
    ("JOB_MEMORY_BYTES", "9" * 500 + "GiB", "no size"),
    ("JOB_OPEN_FILES", "9" * 20, "less than or equal to 1048576"),
    ("MAX_ATTEMPTS", "9" * 20, "less than or equal to 1000"),
]


def fail(status: int, *arguments: str) -> str:
    """The line with which a command ends."""
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(("name", "value", "what_to_write"), WRONG)
@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_wrong_setting_is_named_with_what_to_write(
    command: str, name: str, value: str, what_to_write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ONNX_QAT_{name}", value)
    said = fail(2, command, "--data-dir", str(tmp_path / "data"))
    assert said.startswith(f"error: setting_invalid: ONNX_QAT_{name}: ")
    assert what_to_write in said
    assert "sesame" not in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "value", "part", "what_to_write"),
    [
        ("WEBHOOK_RETRY_SECONDS", "[5,1e300]", "WEBHOOK_RETRY_SECONDS[1]", "less than or equal to 31536000"),
        ("WEBHOOK_PORTS", "[70000]", "WEBHOOK_PORTS[0]", "less than or equal to 65535"),
    ],
)
def test_a_wrong_part_of_a_list_is_named(
    name: str, value: str, part: str, what_to_write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ONNX_QAT_{name}", value)
    said = fail(2, "serve")
    assert said.startswith(f"error: setting_invalid: ONNX_QAT_{part}: ")
    assert what_to_write in said


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_number_has_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is taken is a number that dates, clocks and the kernel can hold."""
    for value in ("inf", "nan", "1e300", "9" * 40, "[1e300]", "[inf]", f"[{'9' * 40}]"):
        monkeypatch.setenv(f"ONNX_QAT_{name.upper()}", value)
        try:
            found = getattr(Settings(), name)
        except ValidationError:
            continue
        assert isinstance(found, str | Path | SecretStr | frozenset), f"{name} takes {value}"
        assert name == "allowed_hosts" or not isinstance(found, frozenset), f"{name} takes {value}"


def test_every_wrong_setting_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_QAT_WORKERS", "x")
    monkeypatch.setenv("ONNX_QAT_METRICS_PORT", "y")
    lines = CliRunner().invoke(app, ["keys", "list"]).stderr.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["ONNX_QAT_WORKERS", "ONNX_QAT_METRICS_PORT"]


def test_settings_that_need_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_QAT_QUEUE", "celery")
    said = fail(2, "serve")
    assert said.startswith("error: setting_invalid: ONNX_QAT_QUEUE=celery needs ONNX_QAT_BROKER_URL and")


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONNX_QAT_{name.upper()}", raising=False)
    without = Settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(f"ONNX_QAT_{name.upper()}", "")
    assert Settings() == without
    assert Settings().model_fields_set == set()


@pytest.mark.parametrize(
    "url", ["postgresql://u:p@host/name", "postgresql+psycopg://host:5432/name?sslmode=require"]
)
def test_addresses_of_postgresql_are_taken(url: str) -> None:
    assert Settings(database_url=url).database_url == url


@pytest.mark.parametrize("arguments", [("serve",), ("worker",), ("migrate",), ("keys", "list")])
def test_a_database_that_is_not_there_is_said_to_be_so(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("ONNX_QAT_DATABASE_URL", f"postgresql://user:sesame@127.0.0.1:{port}/name")
    said = fail(1, *arguments, "--data-dir", str(tmp_path))
    assert said.startswith(
        "error: database_unavailable: The database of ONNX_QAT_DATABASE_URL cannot be used: "
    )
    assert "Connection refused" in said
    assert "sesame" not in said


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_data_directory_that_another_process_holds_is_said_to_be_in_use(
    command: str, tmp_path: Path
) -> None:
    with DataDirectory(tmp_path).locked():
        said = fail(1, command, "--data-dir", str(tmp_path))
    assert said.startswith(
        f"error: data_directory_in_use: Another process uses the data directory {tmp_path};"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign requested address")],
)
def test_a_port_for_metrics_that_cannot_be_had_is_said_to_be_so(
    host: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNX_QAT_METRICS_HOST", host)
    monkeypatch.setattr("service.server.serve", lambda *_, **__: pytest.fail("it begins"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("ONNX_QAT_METRICS_PORT", str(port))
        said = fail(1, "serve", "--data-dir", str(tmp_path))
    assert said.startswith(f"error: metrics_port_unavailable: Port {port} of {host} (ONNX_QAT_METRICS_PORT")
    assert said.endswith(reason)


def test_a_port_for_metrics_that_cannot_be_had_ends_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql_database() as url, socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("ONNX_QAT_DATABASE_URL", url)
        monkeypatch.setenv("ONNX_QAT_METRICS_PORT", str(taken.getsockname()[1]))
        said = fail(1, "worker", "--data-dir", str(tmp_path))
    assert said.startswith("error: metrics_port_unavailable: ")


def test_a_worker_needs_the_database_that_it_shares_with_the_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = fail(2, "worker", "--data-dir", str(tmp_path))
    assert said.startswith("error: setting_invalid: ONNX_QAT_DATABASE_URL is not set: ")
    monkeypatch.setenv("ONNX_QAT_DATABASE_URL", "postgresql://host/name")
    monkeypatch.setenv("ONNX_QAT_WORKERS", "0")
    assert fail(2, "worker", "--data-dir", str(tmp_path)).startswith(
        "error: setting_invalid: ONNX_QAT_WORKERS is 0"
    )
