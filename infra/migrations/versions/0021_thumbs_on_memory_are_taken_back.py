"""What each thumb moved in memory's weights, so that it can be taken back; of earlier ones it is not known.

Revision ID: 0021
Revises: 0020
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("memory_votes", sa.Column("moved", postgresql.JSONB()))


def downgrade() -> None:
    op.drop_column("memory_votes", "moved")
