"""The steps (Alembic) that bring a database of any earlier version to the schema of the mapped classes.

A change of a mapped class needs a new file in versions/, named by the next number and written by hand; a
test compares what the files make with the classes, on SQLite and on PostgreSQL. Files of released versions
are never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect

log = structlog.get_logger()

# What version 0.1.0 made without Alembic.
_BEFORE_ALEMBIC: Final = "0001"


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Apply what is missing, within the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    tables = inspect(connection).get_table_names()
    if "jobs" in tables and "alembic_version" not in tables:
        command.stamp(config, _BEFORE_ALEMBIC)
    before = _revision(connection)
    command.upgrade(config, revision)
    after = _revision(connection)
    if after != before:
        log.info("database brought up to date", was=before, now=after)


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
