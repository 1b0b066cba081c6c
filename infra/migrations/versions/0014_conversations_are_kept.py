"""Conversations that people keep: episodes say which they are a turn of, and what they follow there.

Revision ID: 0014
Revises: 0013
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

NOW = sa.text("now()")
IN_CONVERSATION = sa.text("conversation_id IS NOT NULL")
WORDS = sa.text(
    "(array_to_tsvector(ARRAY['by' || md5(user_id)]) || "
    "to_tsvector('simple', (coalesce((messages -> -1) ->> 'content', '') || ' ') || answer))"
)


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("title", sa.String()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name="fk_conversations_user_id"),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_index("ix_conversations_user_id_updated_at_id", "conversations", ["user_id", "updated_at", "id"])
    op.add_column("episodes", sa.Column("conversation_id", sa.String()))
    op.add_column("episodes", sa.Column("parent_id", sa.String()))
    op.create_foreign_key(
        "fk_episodes_conversation_id", "episodes", "conversations", ["conversation_id"], ["id"]
    )
    # Of rows that are no turn of a conversation neither index knows.
    op.create_index(
        "ix_episodes_conversation_id_id", "episodes", ["conversation_id", "id"], postgresql_where=IN_CONVERSATION
    )
    op.create_index(
        "ix_episodes_words", "episodes", [WORDS], postgresql_using="gin", postgresql_where=IN_CONVERSATION
    )


def downgrade() -> None:
    op.drop_index("ix_episodes_words", "episodes")
    op.drop_index("ix_episodes_conversation_id_id", "episodes")
    op.drop_constraint("fk_episodes_conversation_id", "episodes")
    op.drop_column("episodes", "parent_id")
    op.drop_column("episodes", "conversation_id")
    op.drop_table("conversations")
