"""How an answer was asked for; metadata and messages that people put into their conversations.

Revision ID: 0020
Revises: 0017
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("episodes", sa.Column("request", postgresql.JSONB(none_as_null=True)))
    op.add_column("conversations", sa.Column("metadata", postgresql.JSONB(), server_default="{}", nullable=False))
    op.create_table(
        "conversation_items",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column(
            "conversation_id", sa.String(), sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.CheckConstraint("role IN ('system', 'user', 'assistant')", name=op.f("ck_conversation_items_role")),
    )
    op.create_index("ix_conversation_items_conversation_id_id", "conversation_items", ["conversation_id", "id"])


def downgrade() -> None:
    op.drop_table("conversation_items")
    op.drop_column("conversations", "metadata")
    op.drop_column("episodes", "request")
