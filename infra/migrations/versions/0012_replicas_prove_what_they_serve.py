"""Any number of replicas, each of which proves what it serves, under names that its engine has not had before.

Revision ID: 0012
Revises: 0011
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("releases", sa.Column("probe", JSONB()))
    op.add_column("releases", sa.Column("probe_base", sa.String()))
    op.execute("DELETE FROM attestations")  # each replica proves what it serves within seconds
    op.add_column("attestations", sa.Column("served_as", sa.String(), nullable=False))
    op.add_column("attestations", sa.Column("differs_from_others", sa.Float()))
    op.add_column("attestations", sa.Column("disagrees", sa.Float()))
    op.add_column("attestations", sa.Column("problem", sa.String()))
    op.alter_column("attestations", "differs_from_base", nullable=True)
    op.drop_column("attestations", "differs_from_champion")
    op.create_table(
        "replicas",
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("is_up", sa.Boolean(), nullable=False),
        sa.Column("problem", sa.String()),
        sa.Column("started_at_s", sa.Float()),
        sa.Column("spoiled", JSONB(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("url", name="pk_replicas"),
    )
    op.create_table(
        "wanted_releases",
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["release"], ["releases.name"], name="fk_wanted_releases_release", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("release", name="pk_wanted_releases"),
    )


def downgrade() -> None:
    op.drop_table("wanted_releases")
    op.drop_table("replicas")
    op.execute("DELETE FROM attestations")
    op.add_column("attestations", sa.Column("differs_from_champion", sa.Float(), nullable=False))
    op.alter_column("attestations", "differs_from_base", nullable=False)
    for column in ("problem", "disagrees", "differs_from_others", "served_as"):
        op.drop_column("attestations", column)
    op.drop_column("releases", "probe_base")
    op.drop_column("releases", "probe")
