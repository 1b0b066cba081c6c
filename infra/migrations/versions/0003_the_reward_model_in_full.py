"""The reward model in full: weighed and held signals, raters, gold probes, rulings, who rates at all, asking.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NOW = sa.text("now()")


def upgrade() -> None:
    op.add_column("feedback", sa.Column("address_block", sa.String()))
    _updates()
    op.add_column("reward_scores", sa.Column("abstain", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_table(
        "reward_state",
        sa.Column("encoder", sa.String(), nullable=False),
        sa.Column("guards", postgresql.JSONB(), nullable=False),
        sa.Column("update_seq", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("encoder", name="pk_reward_state"),
    )
    _raters()
    _asking()


def _updates() -> None:
    op.drop_constraint(op.f("uq_reward_updates_feedback_id_action"), "reward_updates", type_="unique")
    op.drop_constraint(op.f("ck_reward_updates_action"), "reward_updates", type_="check")
    op.create_check_constraint("action", "reward_updates", "action IN ('add', 'remove', 'hold', 'inflate')")
    # The first versions kept neither: a vote weighed 1, and a site's target tells which way it pointed.
    for column in (
        sa.Column("key", sa.String(), server_default="thumb", nullable=False),
        sa.Column("verdict", sa.Double(), server_default="0.5", nullable=False),
        sa.Column("weight", sa.Double(), server_default="1", nullable=False),
        sa.Column("inflation", sa.Double(), server_default="1", nullable=False),
    ):
        op.add_column("reward_updates", column)
    op.execute("UPDATE reward_updates SET verdict = CASE WHEN target > 0 THEN 1 ELSE 0 END")
    for column in ("key", "verdict", "weight"):
        op.alter_column("reward_updates", column, server_default=None)


def _raters() -> None:
    op.create_table(
        "reward_raters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("num_votes", sa.Integer(), nullable=False),
        sa.Column("num_right", sa.Integer(), nullable=False),
        sa.Column("num_wrong", sa.Integer(), nullable=False),
        sa.Column("set_aside", sa.Boolean(), nullable=False),
        sa.Column("ruling", sa.String()),
        sa.Column("quarantine", sa.String()),
        sa.Column("block", sa.String()),
        sa.Column("first_at_s", sa.Double(), nullable=False),
        sa.Column("num_seen", sa.Integer(), server_default="0", nullable=False),
        sa.Column("num_rated", sa.Integer(), server_default="0", nullable=False),
        sa.CheckConstraint("ruling IN ('banned', 'cleared')", name=op.f("ck_reward_raters_ruling")),
        sa.PrimaryKeyConstraint("name", name="pk_reward_raters"),
    )
    op.create_index("ix_reward_raters_quarantine", "reward_raters", ["quarantine"])
    op.create_table(
        "gold_probes",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("over", sa.String()),
        sa.Column("good", sa.Boolean(), nullable=False),
        sa.Column("judged", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("operator", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gold_probes"),
    )
    op.create_index("ix_gold_probes_episode_id", "gold_probes", ["episode_id"])
    op.create_table(
        "rater_rulings",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("rater", sa.String()),
        sa.Column("quarantine", sa.String()),
        sa.Column("ruling", sa.String()),
        sa.Column("operator", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rater_rulings"),
    )


def _asking() -> None:
    op.create_table(
        "rating_choices",
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("inputs", postgresql.ARRAY(sa.Float()), nullable=False),
        sa.Column("rated", sa.Boolean()),
        sa.PrimaryKeyConstraint("episode_id", name="pk_rating_choices"),
    )
    op.create_index(
        "ix_rating_choices_open", "rating_choices", ["episode_id"], postgresql_where=sa.text("rated IS NULL")
    )
    op.create_table(
        "solicitations",
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.CheckConstraint("reason IN ('random', 'informative')", name=op.f("ck_solicitations_reason")),
        sa.CheckConstraint("propensity > 0 AND propensity <= 1", name=op.f("ck_solicitations_propensity")),
        sa.PrimaryKeyConstraint("episode_id", name="pk_solicitations"),
    )
    op.create_table(
        "self_evaluations",
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("p_good", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.CheckConstraint("p_good BETWEEN 0 AND 1", name=op.f("ck_self_evaluations_p_good")),
        sa.ForeignKeyConstraint(["episode_id"], ["episodes.id"], name=op.f("fk_self_evaluations_episode_id_episodes")),
        sa.PrimaryKeyConstraint("episode_id", name="pk_self_evaluations"),
    )


def downgrade() -> None:
    raise NotImplementedError("Signals that are held have no place in the earlier schema; restore a backup instead.")
