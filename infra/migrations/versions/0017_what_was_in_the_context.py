"""What was in the context of an answer, and the steps that led to it.

Revision ID: 0017
Revises: 0016
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("episodes", sa.Column("context", postgresql.JSONB(none_as_null=True)))
    op.add_column("episodes", sa.Column("steps", postgresql.JSONB(), server_default="[]", nullable=False))


def downgrade() -> None:
    op.drop_column("episodes", "steps")
    op.drop_column("episodes", "context")
