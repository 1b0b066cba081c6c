"""Training runs that were killed tell when they were gone on with, and how often.

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_runs", sa.Column("resumed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("training_runs", sa.Column("resumes", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("training_runs", "resumes")
    op.drop_column("training_runs", "resumed_at")
