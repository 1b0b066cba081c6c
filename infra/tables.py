"""Tables of the log: the outbox, and where each consumer stands."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from infra.db import Base

Timestamp = sa.DateTime(timezone=True)


class OutboxRow(Base):
    """An event on its way to Kafka; written in the transaction of the change that it reports."""

    __tablename__ = "outbox"

    seq: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    event_id: Mapped[str] = mapped_column(unique=True)
    topic: Mapped[str]
    key: Mapped[str]
    event: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    published_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (sa.Index("ix_outbox_unpublished", "seq", postgresql_where=sa.text("published_at IS NULL")),)


class LogPartition(Base):
    """The newest offset that the relay saw acknowledged, and how often the broker lost its memory."""

    __tablename__ = "log_partitions"

    topic: Mapped[str] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(primary_key=True)
    last_offset: Mapped[int] = mapped_column(sa.BigInteger)
    epoch: Mapped[int] = mapped_column(default=0, server_default="0")


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
