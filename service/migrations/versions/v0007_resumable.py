"""Resumable uploads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "resumable_uploads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("upload_metadata", sa.String(4096), nullable=False),
        sa.Column("kind", sa.String(16)),
        sa.Column("announced_sha256", sa.String(64)),
        sa.Column("sha256", sa.String(64)),
        sa.Column("stored_as", sa.String(16)),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
    )
    op.create_index("resumable_uploads_by_expiry", "resumable_uploads", ["expires_at"])
    op.create_index("resumable_uploads_by_tenant", "resumable_uploads", ["tenant"])
