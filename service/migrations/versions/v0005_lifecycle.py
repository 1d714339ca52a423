"""Webhooks are subscriptions to a job; jobs, uploads and files that are no longer wanted are removed."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("webhook")  # was never filled, like the table of deliveries
    op.create_table(
        "webhook_subscriptions",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("secret", sa.String(100)),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("job", "digest", name="one_webhook_for_each_wish"),
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("secret", sa.String(100), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("previous", sa.String(100)),
        sa.Column("previous_until", sa.DateTime()),
    )
    with op.batch_alter_table("webhook_deliveries") as batch:
        batch.add_column(sa.Column("subscription", sa.String(32), nullable=False))
        batch.add_column(sa.Column("body", sa.Text(), nullable=False))
        batch.create_foreign_key(
            "webhook_deliveries_subscription_fkey", "webhook_subscriptions", ["subscription"], ["id"]
        )
    op.create_table(
        "result_removals",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("due_at", sa.DateTime(), nullable=False),
    )
    op.create_index("result_removals_due", "result_removals", ["due_at"])
    with op.batch_alter_table("uploads") as batch:
        batch.add_column(sa.Column("used_at", sa.DateTime()))
    op.execute("UPDATE uploads SET used_at = created_at")
    with op.batch_alter_table("uploads") as batch:
        batch.alter_column("used_at", existing_type=sa.DateTime(), nullable=False)
    op.create_index("uploads_by_use", "uploads", ["used_at"])
    job_uploads = op.create_table(
        "job_uploads",
        sa.Column("job_number", _NUMBER, sa.ForeignKey("jobs.number", ondelete="CASCADE")),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("upload", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.id"), nullable=False),
        sa.PrimaryKeyConstraint("job_number", "kind", "upload"),
    )
    op.create_index("job_uploads_by_upload", "job_uploads", ["tenant", "kind", "upload"])
    _fill(job_uploads)


# The fields of a job's request that name uploads, with the kinds of these.
_FIELDS = {"model": "models", "calibration": "datasets", "checkpoint": "checkpoints", "verify": "datasets"}


def _fill(job_uploads: sa.Table) -> None:
    rows = []
    for number, tenant, request in op.get_bind().execute(sa.text("SELECT number, tenant, request FROM jobs")):
        fields = json.loads(request) if isinstance(request, str) else request
        rows += [
            {"job_number": number, "tenant": tenant, "kind": kind, "upload": fields[field]}
            for field, kind in _FIELDS.items()
            if fields.get(field) is not None
        ]
    op.bulk_insert(job_uploads, rows)
