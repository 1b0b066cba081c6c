"""Where turns stand and which words they have; what people said of themselves; what importance weighs.

Turns of before have their places from here on; their words are not in the index, and are found by being recent.

Revision ID: 0020
Revises: 0019
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

NOW = sa.text("now()")
PLACES = """
    WITH RECURSIVE turns AS (
        SELECT id, conversation_id, parent_id,
            row_number() OVER (PARTITION BY conversation_id, parent_id ORDER BY id) = 1 AS goes_on
        FROM episodes WHERE conversation_id IS NOT NULL
    ), placed AS (
        SELECT id, conversation_id, id AS line, 0 AS depth, CAST(NULL AS varchar) AS from_line,
            CAST(NULL AS integer) AS from_depth
        FROM turns WHERE parent_id IS NULL
        UNION ALL
        SELECT turns.id, turns.conversation_id,
            CASE WHEN goes_on THEN placed.line ELSE turns.id END, placed.depth + 1,
            CASE WHEN goes_on THEN NULL ELSE placed.line END, CASE WHEN goes_on THEN NULL ELSE placed.depth END
        FROM turns JOIN placed ON turns.parent_id = placed.id AND turns.conversation_id = placed.conversation_id
    ), lines AS (
        INSERT INTO conversation_lines (id, conversation_id, from_line, from_depth)
        SELECT id, conversation_id, from_line, from_depth FROM placed WHERE id = line
    )
    INSERT INTO turn_places (episode_id, conversation_id, line, depth)
    SELECT id, conversation_id, line, depth FROM placed
"""


def _of_conversation() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], ondelete="CASCADE")


def _of_user() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], ondelete="CASCADE")


def _named(constraint: sa.ForeignKeyConstraint, name: str) -> sa.ForeignKeyConstraint:
    constraint.name = name
    return constraint


def upgrade() -> None:
    op.create_table(
        "turn_places",
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("line", sa.String(), nullable=False),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False),
        _named(_of_conversation(), "fk_turn_places_conversation_id"),
        sa.PrimaryKeyConstraint("episode_id", name="pk_turn_places"),
        sa.UniqueConstraint("line", "depth", name="uq_turn_places_line_depth"),
    )
    op.create_index("ix_turn_places_conversation_id", "turn_places", ["conversation_id"])
    op.create_index("ix_turn_places_pinned", "turn_places", ["conversation_id"], postgresql_where=sa.text("pinned"))
    op.create_table(
        "conversation_lines",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("from_line", sa.String()),
        sa.Column("from_depth", sa.Integer()),
        _named(_of_conversation(), "fk_conversation_lines_conversation_id"),
        sa.PrimaryKeyConstraint("id", name="pk_conversation_lines"),
    )
    op.create_index("ix_conversation_lines_conversation_id", "conversation_lines", ["conversation_id"])
    op.create_table(
        "conversation_terms",
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("term", sa.String(), nullable=False),
        sa.Column("num_turns", sa.Integer(), nullable=False),
        sa.Column("turns", postgresql.ARRAY(sa.String()), nullable=False),
        _named(_of_conversation(), "fk_conversation_terms_conversation_id"),
        sa.PrimaryKeyConstraint("conversation_id", "term", name="pk_conversation_terms"),
    )
    op.create_table(
        "memories",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("slot", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("episode_id", sa.String()),
        sa.Column("conversation_id", sa.String()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        _named(_of_user(), "fk_memories_user_id"),
        _named(_of_conversation(), "fk_memories_conversation_id"),
        sa.PrimaryKeyConstraint("id", name="pk_memories"),
        sa.UniqueConstraint("user_id", "slot", name="uq_memories_user_id_slot"),
    )
    op.create_index("ix_memories_conversation_id", "memories", ["conversation_id"])
    op.create_table(
        "memory_choices",
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("remember", sa.Boolean(), nullable=False),
        _named(_of_user(), "fk_memory_choices_user_id"),
        sa.PrimaryKeyConstraint("user_id", name="pk_memory_choices"),
    )
    op.create_table(
        "memory_weights",
        sa.Column("version", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("weights", postgresql.JSONB(), nullable=False),
        sa.Column("baseline", sa.Float(), nullable=False),
        sa.Column("num_votes", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_memory_weights"),
    )
    op.create_table(
        "memory_votes",
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("value", sa.SmallInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("episode_id", name="pk_memory_votes"),
    )
    op.execute(PLACES)


def downgrade() -> None:
    for table in (
        "memory_votes",
        "memory_weights",
        "memory_choices",
        "memories",
        "conversation_terms",
        "conversation_lines",
        "turn_places",
    ):
        op.drop_table(table)
