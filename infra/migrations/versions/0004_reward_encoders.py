"""Versions of the reward model's features: trained backbones and how they were judged.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reward_encoders",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("adapter_path", sa.String()),
        sa.Column("adapter_digest", sa.String()),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("evaluation", postgresql.JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('base-model', 'sentence', 'backbone')", name=op.f("ck_reward_encoders_kind")),
        sa.CheckConstraint(
            "status IN ('active', 'candidate', 'rejected', 'retired')", name=op.f("ck_reward_encoders_status")
        ),
        sa.PrimaryKeyConstraint("name", name="pk_reward_encoders"),
    )
    op.create_index(
        "ix_reward_encoders_active",
        "reward_encoders",
        ["status"],
        unique=True,
        postgresql_where=sa.text("status = 'active'"),
    )


def downgrade() -> None:
    op.drop_table("reward_encoders")
