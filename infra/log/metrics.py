"""What an operator sees of the log: what waits, how far consumers are behind, what was given up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.tables import ConsumerPosition, DeadLetter, LogPartition, OutboxRow
from infra.telemetry.exposition import DatabaseCollector, Sample


@dataclass(frozen=True, slots=True)
class Lag:
    """How many records of one partition a consumer has not applied."""

    consumer: str
    topic: str
    partition: int
    records: int


@dataclass(frozen=True, slots=True)
class LogStatus:
    """The log at one moment.

    Attributes
    ----------
    num_waiting
        Events that the relay has not published: the back-pressure of the broker.
    oldest_waiting_s
        Age of the oldest of them.
    dead_letters
        Open dead letters by consumer.
    """

    num_waiting: int
    oldest_waiting_s: float
    lags: list[Lag]
    dead_letters: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the status as plain data."""
        return asdict(self)


def read(session: Session) -> LogStatus:
    """Read the log's state; every query is served by an index or a small table."""
    waiting, oldest_s = session.execute(
        sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.extract("epoch", sa.func.now() - sa.func.min(OutboxRow.created_at)), 0),
        ).where(OutboxRow.published_at.is_(None))
    ).one()
    # A position of an older epoch says nothing about this one: everything is still to come.
    next_offset = sa.case((ConsumerPosition.epoch == LogPartition.epoch, ConsumerPosition.next_offset), else_=0)
    lags = session.execute(
        sa.select(
            ConsumerPosition.consumer,
            ConsumerPosition.topic,
            ConsumerPosition.partition,
            sa.func.greatest(LogPartition.last_offset + 1 - next_offset, 0),
        )
        .join(
            LogPartition,
            sa.and_(
                LogPartition.topic == ConsumerPosition.topic,
                LogPartition.partition == ConsumerPosition.partition,
            ),
        )
        .order_by(ConsumerPosition.consumer, ConsumerPosition.topic, ConsumerPosition.partition)
    )
    dead = session.execute(
        sa.select(DeadLetter.consumer, sa.func.count())
        .where(DeadLetter.state == "open")
        .group_by(DeadLetter.consumer)
    )
    return LogStatus(int(waiting), float(oldest_s), [Lag(*row) for row in lags], dict(dead.tuples().all()))


class LogCollector(DatabaseCollector):
    """The log's state as Prometheus metrics."""

    up = "everloop_log_up"
    figures: ClassVar = {
        "everloop_log_up": ("Whether the database answered.",),
        "everloop_outbox_waiting_events": ("Events not yet published to Kafka.",),
        "everloop_outbox_oldest_waiting_seconds": ("Age of the oldest unpublished event.",),
        "everloop_consumer_lag_records": (
            "Records of a partition that a consumer has not applied.",
            "consumer",
            "topic",
            "partition",
        ),
        "everloop_dead_letters": ("Open dead letters.", "consumer"),
    }

    def read(self, session: Session) -> Iterator[Sample]:
        status = read(session)
        yield "everloop_outbox_waiting_events", {}, status.num_waiting
        yield "everloop_outbox_oldest_waiting_seconds", {}, status.oldest_waiting_s
        for row in status.lags:
            place = {"consumer": row.consumer, "topic": row.topic, "partition": str(row.partition)}
            yield "everloop_consumer_lag_records", place, row.records
        for consumer, count in status.dead_letters.items():
            yield "everloop_dead_letters", {"consumer": consumer}, count
