"""How far people let tools go, and calls that wait for their yes.

Revision ID: 0019
Revises: 0018
"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def _users(table: str) -> sa.ForeignKeyConstraint:
    name = op.f(f"fk_{table}_user_id")
    return sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=name, ondelete="CASCADE")


def upgrade() -> None:
    op.create_table(
        "tool_choices",
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("tool", sa.String(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.CheckConstraint("level IN ('off', 'ask', 'auto')", name=op.f("ck_tool_choices_level")),
        _users("tool_choices"),
        sa.PrimaryKeyConstraint("user_id", "tool", name=op.f("pk_tool_choices")),
    )
    op.create_table(
        "tool_calls",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), server_default="pending", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("continued_by", sa.String()),
        sa.CheckConstraint("status IN ('pending', 'approved', 'denied')", name=op.f("ck_tool_calls_status")),
        _users("tool_calls"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tool_calls")),
    )
    op.create_index(op.f("ix_tool_calls_episode_id"), "tool_calls", ["episode_id"])
    op.create_index(op.f("ix_tool_calls_user_id"), "tool_calls", ["user_id"])


def downgrade() -> None:
    op.drop_table("tool_calls")
    op.drop_table("tool_choices")
