"""Vectors of questions and answers, by which what was said in other words is found; arrays, so no extension is needed.

Revision ID: 0023
Revises: 0022
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "turn_vectors",
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("is_answer", sa.Boolean(), nullable=False),
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("encoder", sa.String(), nullable=False),
        sa.Column("embedding", postgresql.ARRAY(sa.REAL()), nullable=True),
        sa.PrimaryKeyConstraint("episode_id", "is_answer", name=op.f("pk_turn_vectors")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_turn_vectors_conversation_id_conversations"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_turn_vectors_conversation_id", "turn_vectors", ["conversation_id"])


def downgrade() -> None:
    op.drop_table("turn_vectors")
