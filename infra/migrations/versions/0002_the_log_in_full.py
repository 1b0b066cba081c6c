"""The log in full: users with keys, every kind of signal, receipts, dead letters, episodes by month.

Revision ID: 0002
Revises: 0001
"""

from datetime import UTC, datetime

import orjson
import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from infra.sealing import SubjectKey, seal

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NOW = sa.text("now()")
PERSONAL = {"user_id", "messages", "answer", "text"}
KINDS = (
    "kind IN ('thumb', 'rating', 'reasons', 'comment', 'correction', 'preference', 'implicit', 'verifier', 'judge')"
)


def upgrade() -> None:
    _users()
    _episodes_by_month()
    _feedback()
    _log()
    _receipts()
    op.execute("DELETE FROM features")  # a cache that did not say whose answer it was; it fills again
    op.add_column("features", sa.Column("episode_id", sa.String()))
    op.create_index("ix_features_episode_id", "features", ["episode_id"])
    op.execute("ALTER TABLE reward_updates ALTER COLUMN seq DROP IDENTITY")
    # Vectors do not compress; trying to took half a core at 400 signals a second.
    for table, column in (("reward_updates", "z"), ("features", "phi"), ("reward_snapshots", "theta"),
                          ("reward_snapshots", "covariance")):
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")
    op.add_column("adapters", sa.Column("mark", sa.String()))
    op.create_check_constraint("mark", "adapters", "mark IN ('retrain-required', 'quarantined')")
    op.add_column(
        "training_runs", sa.Column("retrain_required", sa.Boolean(), server_default=sa.false(), nullable=False)
    )


def _users() -> None:
    op.create_table(
        "subject_keys",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("key", sa.LargeBinary()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("destroyed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("key_id", name="pk_subject_keys"),
    )
    op.create_table(
        "users",
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("learn", sa.Boolean()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("forgotten_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("user_id", name="pk_users"),
        sa.ForeignKeyConstraint(["key_id"], ["subject_keys.key_id"], name="fk_users_key_id"),
    )
    op.execute("""
        WITH known AS MATERIALIZED (SELECT user_id, 'sk_' || replace(gen_random_uuid()::text, '-', '') AS key_id
                       FROM (SELECT user_id FROM episodes UNION SELECT user_id FROM feedback) AS u),
             keys AS (INSERT INTO subject_keys (key_id, key)
                      SELECT key_id, uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) FROM known)
        INSERT INTO users (user_id, key_id) SELECT user_id, key_id FROM known
    """)


def _episodes_by_month() -> None:
    op.drop_constraint("fk_feedback_episode_id", "feedback")
    op.drop_constraint("fk_reward_scores_episode_id", "reward_scores")
    op.execute("ALTER TABLE episodes RENAME TO episodes_before")
    op.execute("ALTER TABLE episodes_before RENAME CONSTRAINT pk_episodes TO pk_episodes_before")
    for name in ("user_id", "created_at", "canary_id"):
        op.execute(f"DROP INDEX ix_episodes_{name}")
    op.execute("CREATE TABLE episodes (LIKE episodes_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS) "
               "PARTITION BY RANGE (id)")
    op.create_primary_key("pk_episodes", "episodes", ["id"])
    op.create_index("ix_episodes_created_at", "episodes", ["created_at"])
    op.create_index("ix_episodes_canary_id", "episodes", ["canary_id"])
    op.create_index("ix_episodes_user_id_id", "episodes", ["user_id", "id"])
    op.execute("CREATE TABLE episodes_default PARTITION OF episodes DEFAULT")
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    for _ in range(4):
        following = month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
        low, high = (f"ep_{int(at.timestamp() * 1000):012x}" for at in (month, following))
        op.execute(
            f"CREATE TABLE episodes_{month:%Y_%m} PARTITION OF episodes FOR VALUES FROM ('{low}') TO ('{high}')"
        )
        month = following
    op.execute("INSERT INTO episodes SELECT * FROM episodes_before")
    op.execute("DROP TABLE episodes_before")
    op.create_foreign_key("fk_episodes_user_id", "episodes", "users", ["user_id"], ["user_id"])
    op.create_foreign_key("fk_feedback_episode_id", "feedback", "episodes", ["episode_id"], ["id"])
    op.create_foreign_key("fk_reward_scores_episode_id", "reward_scores", "episodes", ["episode_id"], ["id"])


def _feedback() -> None:
    for name in ("correction_text", "thumb_value", "kind"):
        op.drop_constraint(f"ck_feedback_{name}", "feedback")
    for column in (
        sa.Column("slot", sa.String()),
        sa.Column("score", sa.Double()),
        sa.Column("name", sa.String()),
        sa.Column("reasons", postgresql.ARRAY(sa.String())),
        sa.Column("over", sa.String()),
        sa.Column("given_at", sa.DateTime(timezone=True)),
    ):
        op.add_column("feedback", column)
    op.execute("UPDATE feedback SET slot = episode_id")
    op.alter_column("feedback", "slot", nullable=False)
    op.create_check_constraint("kind", "feedback", KINDS)
    op.create_check_constraint("thumb_value", "feedback", "kind NOT IN ('thumb', 'verifier') OR value IN (-1, 0, 1)")
    op.create_check_constraint("rating_value", "feedback", "kind <> 'rating' OR value BETWEEN 0 AND 5")
    op.create_check_constraint("score", "feedback", "score BETWEEN 0 AND 1")
    op.create_index("ix_feedback_slot", "feedback", ["slot", "user_id", "kind", "seq"])
    op.create_index("ix_feedback_user_id_id", "feedback", ["user_id", "id"])


def _log() -> None:
    # What was applied by the only consumer there was is not needed; what was not stays, as it was written.
    op.execute("DELETE FROM outbox o USING consumed_events c WHERE c.event_id = o.event_id")
    op.add_column("outbox", sa.Column("value", sa.LargeBinary()))
    op.add_column("outbox", sa.Column("headers", postgresql.JSONB()))
    _seal_what_is_left()
    op.alter_column("outbox", "value", nullable=False)
    op.drop_column("outbox", "event")
    op.add_column("log_partitions", sa.Column("topic_id", sa.String()))
    op.create_table(
        "consumers",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("topics", postgresql.ARRAY(sa.String()), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_consumers"),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("topic", sa.String(), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.String()),
        sa.Column("key", sa.LargeBinary()),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("stack", sa.String(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), server_default="open", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.CheckConstraint("state IN ('open', 'retried', 'dropped')", name="ck_dead_letters_state"),
        sa.PrimaryKeyConstraint("id", name="pk_dead_letters"),
    )
    op.create_index("ix_dead_letters_open", "dead_letters", ["id"], postgresql_where=sa.text("state = 'open'"))


def _seal_what_is_left() -> None:
    """Seal what the first version wrote in the clear, so that forgetting a user reaches it."""
    connection = op.get_bind()
    keys = {
        user_id: SubjectKey(key_id, key)
        for user_id, key_id, key in connection.execute(
            sa.text("SELECT user_id, users.key_id, key FROM users JOIN subject_keys USING (key_id)")
        )
    }
    for seq, event in connection.execute(sa.text("SELECT seq, event FROM outbox")).all():
        data = event.get("data", {})
        key = keys.get(data.get("user_id"))
        if key is not None:
            event["subject"] = key.key_id
            data["sealed"] = seal(key, {name: data.pop(name) for name in PERSONAL.intersection(data)})
        connection.execute(
            sa.text("UPDATE outbox SET value = :value WHERE seq = :seq"), {"value": orjson.dumps(event), "seq": seq}
        )


def _receipts() -> None:
    op.create_table(
        "imports",
        sa.Column("file_digest", sa.String(), nullable=False),
        sa.Column("next_line", sa.BigInteger(), nullable=False),
        sa.Column("num_accepted", sa.BigInteger(), nullable=False),
        sa.Column("num_rejected", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("file_digest", name="pk_imports"),
    )
    op.create_table(
        "receipts",
        sa.Column("feedback_id", sa.String(), nullable=False),
        sa.Column("episode_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("reason", sa.String()),
        sa.Column("update_seq", sa.BigInteger()),
        sa.Column("p_before", sa.Double()),
        sa.Column("p_after", sa.Double()),
        sa.CheckConstraint("status IN ('accepted', 'learned', 'set_aside')", name="ck_receipts_status"),
        sa.PrimaryKeyConstraint("feedback_id", name="pk_receipts"),
    )
    op.create_table(
        "receipt_uses",
        sa.Column("feedback_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("dataset_digest", sa.String(), nullable=False),
        sa.Column("reward_snapshot_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("feedback_id", "run_id", name="pk_receipt_uses"),
    )
    op.create_table(
        "receipt_runs",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("release", sa.String()),
        sa.Column("adapter_digest", sa.String()),
        sa.Column("reason", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_receipt_runs"),
    )
    op.create_table(
        "receipt_fates",
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("fate", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("head_version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("release", name="pk_receipt_fates"),
    )
    op.create_table(
        "erasures",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tombstone", sa.String(), nullable=False),
        sa.Column("policy", sa.String(), nullable=False),
        sa.Column("parts", postgresql.JSONB(), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
        sa.UniqueConstraint("tombstone", name="uq_erasures_tombstone"),
    )


def downgrade() -> None:
    raise NotImplementedError("Sealed events cannot be unsealed in place; restore a backup instead.")
