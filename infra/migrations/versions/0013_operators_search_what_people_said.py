"""Operators search what people said (by kind, words, and why it was set aside) and exclude answers from learning.

Revision ID: 0013
Revises: 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_feedback_kind_id", "feedback", ["kind", "id"])
    op.create_index("ix_feedback_over", "feedback", ["over"], postgresql_where=sa.text("over IS NOT NULL"))
    op.create_index(
        "ix_feedback_text",
        "feedback",
        [sa.text("to_tsvector('simple'::regconfig, text)")],
        postgresql_using="gin",
        postgresql_where=sa.text("text IS NOT NULL"),
    )
    op.create_index(
        "ix_receipts_set_aside",
        "receipts",
        ["reason", "feedback_id"],
        postgresql_where=sa.text("status = 'set_aside'"),
    )
    op.add_column("episodes", sa.Column("excluded", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("training_runs", sa.Column("flow_run_id", sa.String()))


def downgrade() -> None:
    op.drop_column("episodes", "excluded")
    op.drop_column("training_runs", "flow_run_id")
    op.drop_index("ix_receipts_set_aside", "receipts")
    op.drop_index("ix_feedback_text", "feedback")
    op.drop_index("ix_feedback_over", "feedback")
    op.drop_index("ix_feedback_kind_id", "feedback")
