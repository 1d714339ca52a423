"""Run by Alembic: applies revisions within the transaction that `service.migrations.upgrade` was given."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # SQLite too: the driver is kept from committing on its own (service/database.py).
    transactional_ddl=True,
)
context.run_migrations()
