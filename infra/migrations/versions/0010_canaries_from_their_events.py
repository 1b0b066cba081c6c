"""Canaries proceed by a plan, and their decisions can be recomputed from their events; autonomy; proposals.

Revision ID: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("canaries", sa.Column("plan", JSONB()))
    # A canary of the version before has one step; it goes on by a plan of the same share.
    op.execute("""
        UPDATE canaries SET plan = jsonb_build_object(
            'steps', jsonb_build_array(share), 'alpha', alpha, 'candidate', 1, 'step_users', 1, 'step_s', 0,
            'max_s', 86400
        )
    """)
    op.alter_column("canaries", "plan", nullable=False)
    op.add_column(
        "canaries",
        sa.Column("looked_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    )
    op.execute("UPDATE canaries SET looked_at = opened_at")
    op.drop_column("canaries", "share")
    op.drop_column("canaries", "alpha")
    op.create_table(
        "canary_events",
        sa.Column("canary_id", sa.Integer(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at_s", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("arm", sa.String()),
        sa.Column("flags", ARRAY(sa.String()), nullable=False),
        sa.Column("good", sa.Boolean()),
        sa.ForeignKeyConstraint(["canary_id"], ["canaries.id"], name="fk_canary_events_canary_id"),
        sa.PrimaryKeyConstraint("canary_id", "seq", name="pk_canary_events"),
        sa.CheckConstraint("kind IN ('trial', 'vote', 'tick', 'hold', 'resume')", name="ck_canary_events_kind"),
    )
    op.execute("""
        CREATE FUNCTION is_append_only() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$
    """)
    op.execute("""
        CREATE TRIGGER canary_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON canary_events
        FOR EACH STATEMENT EXECUTE FUNCTION is_append_only()
    """)
    op.create_table(
        "canary_users",
        sa.Column("canary_id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("voted", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["canary_id"], ["canaries.id"], name="fk_canary_users_canary_id"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.user_id"], name="fk_canary_users_user_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("canary_id", "user_id", name="pk_canary_users"),
    )
    op.create_table(
        "proposals",
        sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True)),
        sa.Column("outcome", sa.String()),
        sa.ForeignKeyConstraint(["release"], ["releases.name"], name="fk_proposals_release"),
        sa.PrimaryKeyConstraint("id", name="pk_proposals"),
        sa.CheckConstraint("action IN ('canary', 'promote')", name="ck_proposals_action"),
    )
    op.create_index(
        "ix_proposals_open", "proposals", ["action", "release"], unique=True,
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.add_column("deployment_head", sa.Column("autonomy", sa.String()))
    op.create_check_constraint(
        "ck_deployment_head_autonomy", "deployment_head", "autonomy IN ('observe', 'propose', 'canary', 'auto')"
    )


def downgrade() -> None:
    op.drop_column("deployment_head", "autonomy")
    op.drop_table("proposals")
    op.drop_table("canary_users")
    op.execute("DROP TRIGGER canary_events_append_only ON canary_events")
    op.drop_table("canary_events")
    op.execute("DROP FUNCTION is_append_only")
    op.add_column("canaries", sa.Column("share", sa.Float(), nullable=False, server_default="0.2"))
    op.add_column("canaries", sa.Column("alpha", sa.Float(), nullable=False, server_default="0.05"))
    op.execute("UPDATE canaries SET share = (plan->'steps'->>0)::float, alpha = (plan->>'alpha')::float")
    op.alter_column("canaries", "share", server_default=None)
    op.alter_column("canaries", "alpha", server_default=None)
    op.drop_column("canaries", "looked_at")
    op.drop_column("canaries", "plan")
