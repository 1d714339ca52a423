"""Tenants and their API keys; every upload, job and idempotency key belongs to a tenant.

Jobs also get what leases, retries, webhooks and retention need. What was there belongs to the tenant
"default"; a job that was started has had one attempt.
"""

from __future__ import annotations

import datetime

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_DEFAULT = "default"


def upgrade() -> None:
    _create_tenants()
    _add_tenant_to_primary_key("uploads", _UPLOADS, ["kind", "id"])
    _add_tenant_to_primary_key("idempotency_keys", _IDEMPOTENCY_KEYS, ["key"])
    _extend_jobs()
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime()),
        sa.Column("last_status", sa.Integer()),
        sa.Column("last_error", sa.String(1000)),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("delivered_at", sa.DateTime()),
    )
    op.create_index("webhook_deliveries_due", "webhook_deliveries", ["state", "next_attempt_at"])
    op.create_index("webhook_deliveries_of_job", "webhook_deliveries", ["job"])


def _create_tenants() -> None:
    tenants = op.create_table(
        "tenants",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("max_bytes", sa.BigInteger()),
        sa.Column("max_queued_jobs", sa.Integer()),
        sa.Column("requests_per_minute", sa.Integer()),
    )
    created_at = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    op.bulk_insert(tenants, [{"id": _DEFAULT, "name": _DEFAULT, "created_at": created_at}])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime()),
        sa.Column("revoked_at", sa.DateTime()),
        sa.Column("last_used_at", sa.DateTime()),
    )


_UPLOADS = sa.Table(
    "uploads",
    sa.MetaData(),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("id", sa.String(64), nullable=False),
    sa.Column("bytes", sa.BigInteger(), nullable=False),
    sa.Column("files", sa.JSON(), nullable=False),
    sa.Column("created_at", sa.DateTime(), nullable=False),
    sa.PrimaryKeyConstraint("kind", "id", name="uploads_pkey"),
)
_IDEMPOTENCY_KEYS = sa.Table(
    "idempotency_keys",
    sa.MetaData(),
    sa.Column("key", sa.String(255), nullable=False),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("job_number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
    sa.Column("created_at", sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="idempotency_keys_job_number_fkey"),
    sa.PrimaryKeyConstraint("key", name="idempotency_keys_pkey"),
)


def _add_tenant_to_primary_key(name: str, table: sa.Table, key: list[str]) -> None:
    """`table` is what there is: SQLite, which makes the table anew, does not tell the key's name."""
    with op.batch_alter_table(name, copy_from=table) as batch:
        batch.add_column(sa.Column("tenant", sa.String(32), nullable=False, server_default=_DEFAULT))
        batch.drop_constraint(f"{name}_pkey", type_="primary")
        batch.create_primary_key(f"{name}_pkey", ["tenant", *key])
        batch.create_foreign_key(f"{name}_tenant_fkey", "tenants", ["tenant"], ["id"])
    with op.batch_alter_table(name) as batch:
        batch.alter_column("tenant", server_default=None)


def _extend_jobs() -> None:
    op.drop_index("jobs_by_state", "jobs")
    op.drop_index("one_job_for_each_request", "jobs")
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("tenant", sa.String(32), nullable=False, server_default=_DEFAULT))
        batch.add_column(sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("heartbeat", sa.BigInteger(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("worker", sa.String(64)))
        batch.add_column(sa.Column("retry_of", sa.String(32)))
        batch.add_column(sa.Column("request_id", sa.String(64)))
        batch.add_column(sa.Column("webhook", sa.JSON()))
        batch.add_column(sa.Column("expires_at", sa.DateTime()))
        batch.create_foreign_key("jobs_tenant_fkey", "tenants", ["tenant"], ["id"])
    with op.batch_alter_table("jobs") as batch:
        for column in ("tenant", "attempt", "heartbeat"):
            batch.alter_column(column, server_default=None)
    op.execute("UPDATE jobs SET attempt = 1 WHERE started_at IS NOT NULL")
    op.create_index("jobs_by_state", "jobs", ["state", "number"])
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "number"])
    op.create_index("jobs_by_expiry", "jobs", ["expires_at"])
    answering = sa.text("state IN ('queued', 'running', 'succeeded')")
    op.create_index(
        "one_job_for_each_request",
        "jobs",
        ["tenant", "request_digest"],
        unique=True,
        sqlite_where=answering,
        postgresql_where=answering,
    )
