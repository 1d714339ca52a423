"""The ways to deploy the service, as environment variables of its processes, each with real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from servers import S3_CREDENTIALS, RedisServer, postgresql_database, s3_bucket


@dataclass(frozen=True)
class Deployment:
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every process."""
    has_workers: bool = False
    """Whether jobs are run by `onnx-qat worker` and not by the API's process."""
    database_url: str = ""
    redis: RedisServer | None = None


@contextmanager
def embedded() -> Iterator[Deployment]:
    """One process, SQLite and a directory."""
    yield Deployment()


@contextmanager
def on_postgresql() -> Iterator[Deployment]:
    """One process, PostgreSQL and a directory."""
    with postgresql_database() as url:
        yield Deployment({"ONNX_QAT_DATABASE_URL": url}, database_url=url)


@contextmanager
def scaled() -> Iterator[Deployment]:
    """API and workers apart, PostgreSQL, an S3 server, and Celery on Redis."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgresql_database())
        redis = stack.enter_context(RedisServer())
        bucket = stack.enter_context(s3_bucket())
        environment = {
            **S3_CREDENTIALS,
            **{f"ONNX_QAT_{name.upper()}": value for name, value in bucket.items()},
            "ONNX_QAT_DATABASE_URL": url,
            "ONNX_QAT_QUEUE": "celery",
            "ONNX_QAT_BROKER_URL": redis.url,
        }
        yield Deployment(environment, has_workers=True, database_url=url, redis=redis)


DEPLOYMENTS = {"embedded": embedded, "postgresql": on_postgresql, "scaled": scaled}
