"""Uploaded content, stored once whoever uploaded it, and which uploads refer to it."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    blobs = op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
    )
    upload_blobs = op.create_table(
        "upload_blobs",
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("upload", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), sa.ForeignKey("blobs.sha256"), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "kind", "upload", "sha256"),
        sa.ForeignKeyConstraint(
            ["tenant", "kind", "upload"],
            ["uploads.tenant", "uploads.kind", "uploads.id"],
            ondelete="CASCADE",
        ),
    )
    op.create_index("upload_blobs_by_content", "upload_blobs", ["sha256"])
    _fill(blobs, upload_blobs)


def _fill(blobs: sa.Table, upload_blobs: sa.Table) -> None:
    """From the lists of files that the uploads carry."""
    connection = op.get_bind()
    contents: dict[str, dict[str, Any]] = {}
    references: list[dict[str, Any]] = []
    query = sa.text("SELECT tenant, kind, id, files, created_at FROM uploads").columns(
        created_at=sa.DateTime()
    )
    for tenant, kind, upload, files, created_at in connection.execute(query):
        listed = json.loads(files) if isinstance(files, str) else files
        for digest, size in {file["sha256"]: file["bytes"] for file in listed}.items():
            contents[digest] = {"sha256": digest, "bytes": size, "created_at": created_at}
            references.append({"tenant": tenant, "kind": kind, "upload": upload, "sha256": digest})
    op.bulk_insert(blobs, list(contents.values()))
    op.bulk_insert(upload_blobs, references)
