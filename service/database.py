"""The database: SQLite in the data directory, one transaction for each `with` block."""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, DateTime, Dialect, Engine, TypeDecorator, create_engine, event, text
from sqlalchemy.orm import DeclarativeBase, Session


class Base(DeclarativeBase):
    """Base of all mapped classes."""


class UtcDateTime(TypeDecorator[datetime.datetime]):
    """A point in time. SQLite keeps no time zone, so values are stored and returned as UTC."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        return None if value is None else value.astimezone(datetime.UTC).replace(tzinfo=None)

    def process_result_value(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        return None if value is None else value.replace(tzinfo=datetime.UTC)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Database:
    """Hands out sessions. Safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        self._reader = create_engine(f"sqlite:///{file}", connect_args={"timeout": 30})
        self._writer = self._reader.execution_options(begin="BEGIN IMMEDIATE")
        _configure_sqlite(self._reader)

    def create_tables(self) -> None:
        Base.metadata.create_all(self._writer)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for queries."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session for changes: committed, and on disk, when the block ends without an exception."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def check(self) -> None:
        """Raise when the database does not answer."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self._reader.dispose()


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute("PRAGMA journal_mode = WAL")
        # FULL: a committed transaction survives a loss of power; an accepted job must.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A write that starts as a read cannot wait for another writer: SQLite answers "busy" at once.
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))
