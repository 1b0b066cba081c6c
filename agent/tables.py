"""Tables of the assistant's memory: where turns stand, which words they have, what people said of themselves."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from infra.db import Base
from infra.tables import Timestamp


class TurnPlace(Base):
    """Where a turn stands: the ``depth``-th of a line. A fork begins a line, named by its first turn."""

    __tablename__ = "turn_places"

    episode_id: Mapped[str] = mapped_column(primary_key=True)
    conversation_id: Mapped[str] = mapped_column(sa.ForeignKey("conversations.id", ondelete="CASCADE"))
    line: Mapped[str]
    depth: Mapped[int]
    pinned: Mapped[bool] = mapped_column(default=False, server_default=sa.false())

    __table_args__ = (
        sa.UniqueConstraint("line", "depth"),
        sa.Index("ix_turn_places_conversation_id", "conversation_id"),
        sa.Index("ix_turn_places_pinned", "conversation_id", postgresql_where=sa.text("pinned")),
    )


class Line(Base):
    """A line of a conversation, and where it left another; null for one that begins the conversation."""

    __tablename__ = "conversation_lines"

    id: Mapped[str] = mapped_column(primary_key=True)
    conversation_id: Mapped[str] = mapped_column(sa.ForeignKey("conversations.id", ondelete="CASCADE"), index=True)
    from_line: Mapped[str | None]
    from_depth: Mapped[int | None]


class ConversationTerm(Base):
    """A word's stem in a conversation: how many turns have it, and the newest of them."""

    __tablename__ = "conversation_terms"

    conversation_id: Mapped[str] = mapped_column(
        sa.ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True
    )
    term: Mapped[str] = mapped_column(primary_key=True)
    num_turns: Mapped[int]
    turns: Mapped[list[str]] = mapped_column(ARRAY(sa.String))


class TurnVector(Base):
    """The vector of what was asked in a turn, or answered; null where there are no words."""

    __tablename__ = "turn_vectors"

    episode_id: Mapped[str] = mapped_column(primary_key=True)
    is_answer: Mapped[bool] = mapped_column(primary_key=True)
    conversation_id: Mapped[str] = mapped_column(sa.ForeignKey("conversations.id", ondelete="CASCADE"), index=True)
    encoder: Mapped[str]
    embedding: Mapped[list[float] | None] = mapped_column(ARRAY(sa.REAL))


class Memory(Base):
    """What somebody said of themselves, or asked to be remembered, with the turn in which they did."""

    __tablename__ = "memories"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id", ondelete="CASCADE"))
    slot: Mapped[str]
    text: Mapped[str]
    episode_id: Mapped[str | None]
    conversation_id: Mapped[str | None] = mapped_column(
        sa.ForeignKey("conversations.id", ondelete="CASCADE"), index=True
    )
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (sa.UniqueConstraint("user_id", "slot"),)


class MemoryChoice(Base):
    """Whether somebody wants to be remembered across conversations; whoever said nothing has no row."""

    __tablename__ = "memory_choices"

    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True)
    remember: Mapped[bool]


class MemoryWeights(Base):
    """A version of the weights of importance; the latest is in force."""

    __tablename__ = "memory_weights"

    version: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    weights: Mapped[dict[str, Any]] = mapped_column(JSONB)
    baseline: Mapped[float]
    num_votes: Mapped[int]
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class MemoryVote(Base):
    """The thumb on an answer that counts in the weights, and what it moved; value 0 for one that was taken back."""

    __tablename__ = "memory_votes"

    episode_id: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(sa.SmallInteger)
    version: Mapped[int]
    moved: Mapped[dict[str, float] | None] = mapped_column(JSONB(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
