"""Tables of the log: the outbox, where each consumer stands, dead letters, and the keys that seal."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from infra.db import Base

Timestamp = sa.DateTime(timezone=True)


class OutboxRow(Base):
    """An event on its way to Kafka; written in the transaction of the change that it reports.

    ``value`` is exactly what goes to Kafka, so the relay copies and never interprets.
    """

    __tablename__ = "outbox"

    seq: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    event_id: Mapped[str] = mapped_column(unique=True)
    topic: Mapped[str]
    key: Mapped[str]
    value: Mapped[bytes]
    headers: Mapped[dict[str, str] | None] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    published_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (sa.Index("ix_outbox_unpublished", "seq", postgresql_where=sa.text("published_at IS NULL")),)


class LogPartition(Base):
    """The newest offset that the relay saw acknowledged, and how often the broker lost its memory.

    ``topic_id`` is the id that the broker gave the topic when it was created; a topic made anew has another.
    """

    __tablename__ = "log_partitions"

    topic: Mapped[str] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(primary_key=True)
    last_offset: Mapped[int] = mapped_column(sa.BigInteger)
    epoch: Mapped[int] = mapped_column(default=0, server_default="0")
    topic_id: Mapped[str | None]


class ConsumerRow(Base):
    """A consumer that the log knows: nothing that it has not applied is pruned or left out of a replay."""

    __tablename__ = "consumers"

    name: Mapped[str] = mapped_column(primary_key=True)
    topics: Mapped[list[str]] = mapped_column(ARRAY(sa.String))
    registered_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class ConsumerPosition(Base):
    """The next offset of a consumer, valid within one epoch of the partition."""

    __tablename__ = "consumer_positions"

    consumer: Mapped[str] = mapped_column(primary_key=True)
    topic: Mapped[str] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(primary_key=True)
    next_offset: Mapped[int] = mapped_column(sa.BigInteger)
    epoch: Mapped[int] = mapped_column(default=0, server_default="0")


class ConsumedEvent(Base):
    """An event that a consumer has applied; what makes a second delivery harmless."""

    __tablename__ = "consumed_events"

    consumer: Mapped[str] = mapped_column(primary_key=True)
    event_id: Mapped[str] = mapped_column(primary_key=True)
    dead_letter: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    consumed_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class DeadLetter(Base):
    """A record that a consumer gave up, with the reason; kept here because the broker may forget."""

    __tablename__ = "dead_letters"

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    consumer: Mapped[str]
    topic: Mapped[str]
    partition: Mapped[int]
    offset: Mapped[int] = mapped_column(sa.BigInteger)
    event_id: Mapped[str | None]
    key: Mapped[bytes | None]
    value: Mapped[bytes]
    reason: Mapped[str]
    stack: Mapped[str]
    tries: Mapped[int]
    state: Mapped[str] = mapped_column(server_default="open")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.CheckConstraint("state IN ('open', 'retried', 'dropped')", name="state"),
        sa.Index("ix_dead_letters_open", "id", postgresql_where=sa.text("state = 'open'")),
    )


class SubjectKeyRow(Base):
    """The key that seals what one person said; null once it was destroyed."""

    __tablename__ = "subject_keys"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[bytes | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    destroyed_at: Mapped[datetime | None] = mapped_column(Timestamp)
