"""Tables of what happened: users, episodes, what people said of them, and what became of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from feedback.steps import seen
from infra.db import Base
from infra.tables import Timestamp


class User(Base):
    """Somebody who talks to the assistant. A forgotten user leaves a tombstone, under a name that says nothing."""

    __tablename__ = "users"

    user_id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(sa.ForeignKey("subject_keys.key_id"))
    learn: Mapped[bool | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    forgotten_at: Mapped[datetime | None] = mapped_column(Timestamp)


class Conversation(Base):
    """A conversation that somebody keeps; its turns are episodes."""

    __tablename__ = "conversations"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id"))
    title: Mapped[str | None]
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSONB, default=dict, server_default="{}")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (sa.Index("ix_conversations_user_id_updated_at_id", "user_id", "updated_at", "id"),)


class ConversationItem(Base):
    """A message that somebody put into a conversation without asking for an answer; goes with the conversation."""

    __tablename__ = "conversation_items"

    id: Mapped[str] = mapped_column(primary_key=True)
    conversation_id: Mapped[str] = mapped_column(sa.ForeignKey("conversations.id", ondelete="CASCADE"))
    role: Mapped[str]
    content: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.CheckConstraint("role IN ('system', 'user', 'assistant')", name="role"),
        sa.Index("ix_conversation_items_conversation_id_id", "conversation_id", "id"),
    )


# What was asked is the last message of a prompt; the others were said before.
QUESTION = "(messages -> -1) ->> 'content'"
# Whose words they are is a word among them: so the index finds one person's words, however many others use them.
# The parentheses are PostgreSQL's, or the models would seem to differ from the migrated schema.
WORDS = (
    "(array_to_tsvector(ARRAY['by' || md5(user_id)]) || "
    f"to_tsvector('simple', (coalesce({QUESTION}, '') || ' ') || answer))"
)
IN_CONVERSATION = sa.text("conversation_id IS NOT NULL")


class Episode(Base):
    """One answer, with all that is needed to learn from it. Partitioned by month through its id."""

    __tablename__ = "episodes"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now(), index=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id"))
    release: Mapped[str]
    adapter_digest: Mapped[str | None]
    canary_id: Mapped[int | None] = mapped_column(index=True)
    arm: Mapped[str]
    propensity: Mapped[float]
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    answer: Mapped[str]
    status: Mapped[str]
    finish_reason: Mapped[str | None]
    sampling: Mapped[dict[str, Any]] = mapped_column(JSONB)
    token_ids: Mapped[list[int]] = mapped_column(ARRAY(sa.Integer))
    logprobs: Mapped[list[float]] = mapped_column(ARRAY(sa.Float))
    num_prompt_tokens: Mapped[int]
    ttft_ms: Mapped[float | None]
    latency_ms: Mapped[float]
    learn: Mapped[bool]
    excluded: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    conversation_id: Mapped[str | None] = mapped_column(sa.ForeignKey("conversations.id"))
    parent_id: Mapped[str | None]
    # How `messages` was made of what was said before; null where they are what the client sent.
    context: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    # What happened between the question and the answer: calls of tools with their results.
    steps: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, default=list, server_default="[]")
    # How it was asked for, beside messages and sampling: metadata, form of the answer, which API; null for none.
    request: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    # The answer that this one goes on from, after a yes or where that broke off: both are one turn.
    continues: Mapped[str | None]

    __table_args__ = (
        sa.CheckConstraint("status IN ('complete', 'interrupted', 'failed')", name="status"),
        sa.Index("ix_episodes_continues", "continues", postgresql_where=sa.text("continues IS NOT NULL")),
        sa.CheckConstraint("propensity > 0 AND propensity <= 1", name="propensity"),
        sa.Index("ix_episodes_user_id_id", "user_id", "id"),
        sa.Index("ix_episodes_conversation_id_id", "conversation_id", "id", postgresql_where=IN_CONVERSATION),
        sa.Index("ix_episodes_words", sa.text(WORDS), postgresql_using="gin", postgresql_where=IN_CONVERSATION),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What the model had before it when it wrote the answer: the prompt, and what tools had returned."""
        return seen(self.messages, self.steps)


class ToolChoice(Base):
    """How far somebody lets a tool go; whoever said nothing has no row. Goes with its person."""

    __tablename__ = "tool_choices"

    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True)
    tool: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[str]

    __table_args__ = (sa.CheckConstraint("level IN ('off', 'ask', 'auto')", name="level"),)


class ToolCall(Base):
    """A call that waits, or waited, for somebody's yes. What is asked for stands in the episode's steps alone."""

    __tablename__ = "tool_calls"

    id: Mapped[str] = mapped_column(primary_key=True)
    episode_id: Mapped[str] = mapped_column(index=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id", ondelete="CASCADE"), index=True)
    status: Mapped[str] = mapped_column(default="pending", server_default="pending")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp)
    continued_by: Mapped[str | None]

    __table_args__ = (sa.CheckConstraint("status IN ('pending', 'approved', 'denied')", name="status"),)


class SelfEvaluation(Base):
    """How probable the release that gave an answer found it that the answer was good, asked right afterwards."""

    __tablename__ = "self_evaluations"

    episode_id: Mapped[str] = mapped_column(sa.ForeignKey("episodes.id"), primary_key=True)
    release: Mapped[str]
    p_good: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (sa.CheckConstraint("p_good BETWEEN 0 AND 1", name="p_good"),)


class Feedback(Base):
    """One signal; append-only. The latest of one rater in one slot stands (:mod:`feedback.fold`)."""

    __tablename__ = "feedback"

    seq: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    episode_id: Mapped[str] = mapped_column(sa.ForeignKey("episodes.id"), index=True)
    user_id: Mapped[str]
    kind: Mapped[str]
    slot: Mapped[str]
    value: Mapped[int | None] = mapped_column(sa.SmallInteger)
    score: Mapped[float | None]
    name: Mapped[str | None]
    reasons: Mapped[list[str] | None] = mapped_column(ARRAY(sa.String))
    over: Mapped[str | None]
    text: Mapped[str | None]
    address_block: Mapped[str | None]
    given_at: Mapped[datetime | None] = mapped_column(Timestamp)
    idempotency_key: Mapped[str]
    body_digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.UniqueConstraint("user_id", "idempotency_key"),
        sa.Index("ix_feedback_slot", "slot", "user_id", "kind", "seq"),
        sa.Index("ix_feedback_user_id_id", "user_id", "id"),
        sa.Index("ix_feedback_kind_id", "kind", "id"),
        sa.Index("ix_feedback_over", "over", postgresql_where=sa.text("over IS NOT NULL")),
        sa.Index(
            "ix_feedback_text",
            sa.text("to_tsvector('simple'::regconfig, text)"),
            postgresql_using="gin",
            postgresql_where=sa.text("text IS NOT NULL"),
        ),
        sa.CheckConstraint(
            "kind IN ('thumb', 'rating', 'reasons', 'comment', 'correction', 'preference', 'implicit', "
            "'verifier', 'judge')",
            name="kind",
        ),
        sa.CheckConstraint("kind NOT IN ('thumb', 'verifier') OR value IN (-1, 0, 1)", name="thumb_value"),
        sa.CheckConstraint("kind <> 'rating' OR value BETWEEN 0 AND 5", name="rating_value"),
        sa.CheckConstraint("score BETWEEN 0 AND 1", name="score"),
    )


class Import(Base):
    """How far the import of a file came; a second start goes on from there."""

    __tablename__ = "imports"

    file_digest: Mapped[str] = mapped_column(primary_key=True)
    next_line: Mapped[int] = mapped_column(sa.BigInteger)
    num_accepted: Mapped[int] = mapped_column(sa.BigInteger)
    num_rejected: Mapped[int] = mapped_column(sa.BigInteger)


class ReceiptRow(Base):
    """Projection of the log: what the reward model did with a signal."""

    __tablename__ = "receipts"

    feedback_id: Mapped[str] = mapped_column(primary_key=True)
    episode_id: Mapped[str]
    status: Mapped[str]
    reason: Mapped[str | None]
    update_seq: Mapped[int | None] = mapped_column(sa.BigInteger)
    p_before: Mapped[float | None]
    p_after: Mapped[float | None]

    __table_args__ = (
        sa.CheckConstraint("status IN ('accepted', 'learned', 'set_aside')", name="status"),
        sa.Index(
            "ix_receipts_set_aside", "reason", "feedback_id", postgresql_where=sa.text("status = 'set_aside'")
        ),
    )


class ReceiptUse(Base):
    """Projection of the log: a run whose dataset holds a signal."""

    __tablename__ = "receipt_uses"

    feedback_id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    dataset_digest: Mapped[str]
    reward_snapshot_id: Mapped[int]


class ReceiptRun(Base):
    """Projection of the log: how a run ended."""

    __tablename__ = "receipt_runs"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    release: Mapped[str | None]
    adapter_digest: Mapped[str | None]
    reason: Mapped[str]


class ReceiptFate(Base):
    """Projection of the log: what became of a release, after which version of the head."""

    __tablename__ = "receipt_fates"

    release: Mapped[str] = mapped_column(primary_key=True)
    fate: Mapped[str]
    reason: Mapped[str]
    head_version: Mapped[int]


class Erasure(Base):
    """A person was forgotten: what was found where, reported by each room as it erased its part."""

    __tablename__ = "erasures"

    id: Mapped[str] = mapped_column(primary_key=True)
    tombstone: Mapped[str] = mapped_column(unique=True)
    policy: Mapped[str]
    parts: Mapped[dict[str, Any]] = mapped_column(JSONB)
    requested_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
