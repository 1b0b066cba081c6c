"""Training runs can be cancelled.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BEFORE = "status IN ('running', 'canary', 'held', 'skipped', 'failed')"
AFTER = "status IN ('running', 'canary', 'held', 'skipped', 'failed', 'cancelled')"


def upgrade() -> None:
    op.add_column(
        "training_runs", sa.Column("cancel_requested", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    op.drop_constraint("ck_training_runs_status", "training_runs")
    op.create_check_constraint("status", "training_runs", AFTER)


def downgrade() -> None:
    op.execute("UPDATE training_runs SET status = 'failed' WHERE status = 'cancelled'")
    op.drop_constraint("ck_training_runs_status", "training_runs")
    op.create_check_constraint("status", "training_runs", BEFORE)
    op.drop_column("training_runs", "cancel_requested")
