"""The size of a job's result, which counts towards its tenant's quota."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("result_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("result_bytes", server_default=None)
    connection = op.get_bind()
    update = sa.text("UPDATE jobs SET result_bytes = :size WHERE number = :number")
    jobs = connection.execute(sa.text("SELECT number, files, bundle FROM jobs WHERE state = 'succeeded'"))
    for number, files, bundle in jobs.all():
        stored = [*_decoded(files), *filter(None, [_decoded(bundle)])]
        connection.execute(update, {"number": number, "size": sum(file["bytes"] for file in stored)})


def _decoded(value: Any) -> Any:
    """SQLite keeps JSON as text, which the driver hands out as it is."""
    return json.loads(value) if isinstance(value, str) else value
