"""Real servers for tests: each test gets a database of its own, which is dropped at its end.

Where a server is absent the test is skipped, unless ONNX_QAT_TEST_REQUIRE (names with commas between them)
demands it.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import boto3
import psycopg
import pytest
import redis
from moto.server import ThreadedMotoServer

POSTGRESQL: Final = os.environ.get(
    "ONNX_QAT_TEST_POSTGRESQL_URL", "postgresql://postgres@127.0.0.1:5432/postgres"
)

S3_CREDENTIALS: Final = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
"""Environment variables with which the S3 server of `s3_bucket` lets one in."""


def absent(server: str, error: Exception) -> None:
    """Skip the test for want of a server, or fail it where that server is demanded."""
    message = f"{server} does not answer: {error}"
    if server in os.environ.get("ONNX_QAT_TEST_REQUIRE", "").split(","):
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def postgresql_database() -> Iterator[str]:
    """URL of a new, empty database."""
    name = f"onnx_qat_test_{uuid.uuid4().hex[:12]}"
    try:
        server = psycopg.connect(POSTGRESQL, autocommit=True, connect_timeout=5)
    except psycopg.OperationalError as error:
        absent("postgresql", error)
        raise
    with server:
        server.execute(f'CREATE DATABASE "{name}"')
        try:
            yield f"{POSTGRESQL.rpartition('/')[0]}/{name}"
        finally:
            server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def wait_until_one_waits_for_a_lock(database_url: str) -> None:
    """Wait until a statement in the database waits for a lock that another transaction has."""
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 60
    with psycopg.connect(database_url, autocommit=True) as connection:
        while connection.execute(query).fetchone() == (0,):
            assert time.monotonic() < deadline, "no statement waits"
            time.sleep(0.01)


@contextmanager
def s3_bucket() -> Iterator[dict[str, str]]:
    """Settings for a new, empty bucket with a prefix, on an S3 server of its own (moto's)."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        s3_client(endpoint).create_bucket(Bucket="onnx-qat")
        yield {"store_url": "s3://onnx-qat/some/prefix", "store_endpoint": endpoint}
    finally:
        server.stop()


def s3_client(endpoint: str) -> Any:
    """Amazon's own client."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=S3_CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )


class RedisServer:
    """A Redis server in a process of its own, which keeps nothing on disk. Use as a context manager."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        arguments = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        try:
            self._process = subprocess.Popen(
                ["redis-server", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except FileNotFoundError as error:
            absent("redis", error)
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "Redis does not start"
                time.sleep(0.02)
        client.close()

    def stop(self) -> None:
        """End it, with all that it held."""
        self._process.kill()
        self._process.wait()


class PostgresqlServer:
    """A PostgreSQL server of its own, which a test may end and start again. Use as a context manager."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> PostgresqlServer:
        self._directory = Path(tempfile.mkdtemp(prefix="onnx-qat-postgresql-"))
        if self._user is not None:
            shutil.chown(self._directory, self._user)
        try:
            self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--no-instructions")
        except (FileNotFoundError, LookupError, PermissionError) as error:
            shutil.rmtree(self._directory)
            absent("postgresql", error)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        shutil.rmtree(self._directory)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self._run("pg_ctl", "start", "--wait", "--options", options, "--log", str(self._directory / "log"))

    def kill(self) -> None:
        """End it as a crash would: what was not committed is gone, and the next start recovers."""
        self._run("pg_ctl", "stop", "--mode=immediate", "--wait")

    def _run(self, command: str, *arguments: str) -> None:
        # Beside the other programs of the newest release, or wherever this machine has them.
        places = [
            os.environ["PATH"],
            *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True),
        ]
        program = shutil.which(command, path=os.pathsep.join(places))
        if program is None:
            raise FileNotFoundError(f"there is no {command}")
        subprocess.run(
            [program, "--pgdata", str(self._directory / "data"), *arguments],
            check=True,
            cwd=self._directory,
            user=self._user,
            stdout=subprocess.DEVNULL,
        )
