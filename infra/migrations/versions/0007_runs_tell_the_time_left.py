"""Training runs tell how long their phase still takes.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_runs", sa.Column("seconds_left", sa.Float(), nullable=True))


def downgrade() -> None:
    op.drop_column("training_runs", "seconds_left")
