"""Two answers to choose from: what is asked for is a rating, or a choice.

Revision ID: 0015
Revises: 0014
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("solicitations", sa.Column("form", sa.String(), server_default="rating", nullable=False))
    op.create_check_constraint("form", "solicitations", "form IN ('rating', 'pair')")


def downgrade() -> None:
    op.drop_constraint("ck_solicitations_form", "solicitations")
    op.drop_column("solicitations", "form")
