"""The database: SQLite or PostgreSQL by its URL, one transaction for each `with` block."""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    DateTime,
    Dialect,
    Engine,
    TypeDecorator,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Session

from service import migrations

# How often a change is tried that collides with one of another process.
_WRITE_ATTEMPTS: Final = 5
_DEADLOCK_DETECTED: Final = "40P01"  # PostgreSQL's manual, appendix A
# Taken by the replica that migrates a PostgreSQL database; any number that nobody else uses.
_MIGRATION_LOCK: Final = 0x6F6E_6E78_7161

T = TypeVar("T")


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
    """Hands out sessions. Safe to use from several threads, and on PostgreSQL from several processes."""

    def __init__(self, url: str | URL) -> None:
        url = make_url(url)
        self.is_sqlite: Final = url.get_backend_name() == "sqlite"
        """SQLite serves one process: the one that holds the data directory."""
        self._reader = _sqlite_engine(url) if self.is_sqlite else _postgresql_engine(url)
        self._writer = self._reader.execution_options(begin="BEGIN IMMEDIATE")

    def migrate(self) -> None:
        """Bring the schema up to date; several processes may call this at the same time.

        On SQLite the caller holds the data directory, on PostgreSQL an advisory lock keeps order.
        """
        if self.is_sqlite:
            with _without_foreign_keys(self._writer) as connection, connection.begin():
                migrations.upgrade(connection)
        else:
            with self._writer.begin() as connection:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
                migrations.upgrade(connection)

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

    def write(self, change: Callable[[Session], T]) -> T:
        """Call `change` in a transaction, again when it collides with one of another process.

        SQLite lets one writer in at a time; PostgreSQL lets two look and find nothing, and then refuses
        the second insertion. The next call finds what the other one inserted. Of transactions that wait
        for each other PostgreSQL ends one and undoes it; it is made again.
        """
        for _ in range(_WRITE_ATTEMPTS - 1):
            try:
                with self.writing() as session:
                    return change(session)
            except IntegrityError:
                continue
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != _DEADLOCK_DETECTED:
                    raise
        with self.writing() as session:
            return change(session)

    def check(self) -> None:
        """Raise when the database does not answer."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self._reader.dispose()


def _postgresql_engine(url: URL) -> Engine:
    # The driver is psycopg 3, whether or not the URL names it.
    # A connection that the server closed meanwhile is noticed and replaced before it is used.
    # Values are kept out of errors, and so of logs: some are secret.
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=15,
        connect_args={"connect_timeout": 10},
    )


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": 30})

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

    return engine


@contextmanager
def _without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A connection on which tables can be made anew without touching the rows that refer to them.

    SQLite changes this outside of transactions only.
    """
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA foreign_keys = OFF")
        try:
            yield connection
        finally:
            driver.execute("PRAGMA foreign_keys = ON")
