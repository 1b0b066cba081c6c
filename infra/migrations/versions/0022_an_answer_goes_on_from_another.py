"""Which answer one goes on from stands in a column of its own: both are one turn.

Revision ID: 0022
Revises: 0021
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("episodes", sa.Column("continues", sa.String()))
    goes_on = "jsonb_array_length(steps) > 0 AND steps -> 0 ? 'continues'"
    op.execute(f"UPDATE episodes SET continues = steps -> 0 ->> 'continues' WHERE {goes_on}")
    op.create_index(
        "ix_episodes_continues", "episodes", ["continues"], postgresql_where=sa.text("continues IS NOT NULL")
    )


def downgrade() -> None:
    op.drop_index("ix_episodes_continues", table_name="episodes")
    op.drop_column("episodes", "continues")
