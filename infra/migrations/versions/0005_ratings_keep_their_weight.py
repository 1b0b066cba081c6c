"""What a rating by choice weighs is decided once.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rating_choices", sa.Column("weight", sa.Double()))


def downgrade() -> None:
    op.drop_column("rating_choices", "weight")
