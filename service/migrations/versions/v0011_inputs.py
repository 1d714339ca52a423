"""What a job works on, apart from its request, whose strings PostgreSQL cannot all decode."""

from __future__ import annotations

import json
from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

_INPUTS: Final = ("model", "calibration", "prepare_job", "checkpoint", "verify")
# Requests are not all in memory at a time.
_ROWS: Final = 100


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("inputs", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("inputs", server_default=None)
    connection = op.get_bind()
    some = sa.text("SELECT number, request FROM jobs WHERE number > :last ORDER BY number LIMIT :rows")
    update = sa.text("UPDATE jobs SET inputs = :inputs WHERE number = :number")
    last = 0
    while rows := connection.execute(some, {"last": last, "rows": _ROWS}).all():
        for number, request in rows:
            stored = _decoded(request)
            inputs = {name: stored[name] for name in _INPUTS if stored.get(name) is not None}
            connection.execute(update, {"number": number, "inputs": json.dumps(inputs)})
        last = rows[-1][0]


def _decoded(value: Any) -> Any:
    """SQLite keeps JSON as text, which the driver hands out as it is."""
    return json.loads(value) if isinstance(value, str) else value
