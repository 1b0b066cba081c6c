"""Adapters lie where their digest says, and may lose their files.

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_column("adapters", "path")
    op.add_column(
        "adapters", sa.Column("stored_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False)
    )
    op.execute("UPDATE adapters SET stored_at = created_at")
    op.add_column("adapters", sa.Column("files_deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint("digest", "adapters", "digest ~ '^[0-9a-f]{64}$'")


def downgrade() -> None:
    op.drop_constraint("ck_adapters_digest", "adapters")
    op.drop_column("adapters", "files_deleted_at")
    op.drop_column("adapters", "stored_at")
    op.add_column("adapters", sa.Column("path", sa.String(), nullable=False, server_default=""))
    op.alter_column("adapters", "path", server_default=None)
