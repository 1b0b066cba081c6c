"""The relay: publishes outbox rows to Kafka in order, and marks them published.

One relay publishes at a time (an advisory lock), because order per key matters more than the second
relay's throughput; any others stand by. If it dies between publishing and marking, rows are published
again, which consumers skip.

A broker may lose its memory (the embedded one keeps nothing after a stop). The relay is the only producer,
so an offset that does not grow proves it: the partition's epoch is raised, and what a consumer still lacks
is published again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence

import sqlalchemy as sa
from kafka import KafkaProducer
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from infra import kafka
from infra.db import Sessions, advisory_lock, connect
from infra.process import run_until_stopped
from infra.settings import Settings, load
from infra.tables import ConsumedEvent, LogPartition, OutboxRow

log = logging.getLogger("everloop.relay")

BATCH_ROWS = 500
IDLE_S = 0.05
MEMORY_CHECK_S = 1.0


class BrokerLostMemoryError(Exception):
    """The broker hands out offsets that it handed out before.

    Parameters
    ----------
    partitions
        (topic, partition) of each place where it did.
    """

    def __init__(self, partitions: Sequence[tuple[str, int]]) -> None:
        super().__init__(f"the broker went back in {partitions}")
        self.partitions = partitions


class Relay:
    """Moves events from the outbox to Kafka.

    Parameters
    ----------
    sessions
        Session factory on the database.
    settings
        For the broker's address and the number of partitions.
    """

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        self.sessions = sessions
        self.bootstrap = settings.need("kafka_bootstrap")
        self.num_partitions = settings.kafka_partitions
        self._producer: KafkaProducer | None = None

    def run(self, stop: threading.Event) -> None:
        """Publish until told to stop; a broker that is away is tried again every second."""
        while not stop.is_set():
            try:
                with advisory_lock(self.sessions, "relay") as held:
                    if held:
                        self._connect()
                        self._pump(stop)
                    else:
                        stop.wait(1.0)
            except BrokerLostMemoryError as error:
                log.warning("%s", error)
                with self.sessions.begin() as session:
                    self._start_over(session, error.partitions)
            except kafka.KafkaError as error:
                log.warning("broker away (%s); events wait in the outbox", type(error).__name__)
                stop.wait(1.0)
            except (OperationalError, InterfaceError) as error:
                log.warning("database away (%s)", type(error).__name__)
                stop.wait(1.0)
            finally:
                self._disconnect()

    def _connect(self) -> None:
        if self._producer is None:
            kafka.ensure_topics(self.bootstrap, self.num_partitions)
            self._producer = kafka.producer(self.bootstrap)
            self.check_memory()

    def _disconnect(self) -> None:
        if self._producer is not None:
            self._producer.close(timeout=1)
            self._producer = None

    def _pump(self, stop: threading.Event) -> None:
        idle_s = 0.0
        while not stop.is_set():
            if self.publish_batch():
                idle_s = 0.0
                continue
            stop.wait(IDLE_S)
            idle_s += IDLE_S
            if idle_s >= MEMORY_CHECK_S:
                idle_s = 0.0
                self.check_memory()

    def publish_batch(self) -> int:
        """Publish the oldest waiting rows; return how many."""
        assert self._producer is not None
        with self.sessions.begin() as session:
            rows = session.scalars(
                sa.select(OutboxRow)
                .where(OutboxRow.published_at.is_(None))
                .order_by(OutboxRow.seq)
                .limit(BATCH_ROWS)
            ).all()
            if not rows:
                return 0
            futures = [
                self._producer.send(
                    row.topic, key=row.key.encode(), value=json.dumps(row.event, ensure_ascii=False).encode()
                )
                for row in rows
            ]
            self._producer.flush()
            newest: dict[tuple[str, int], list[int]] = {}
            for future in futures:
                meta = future.get(timeout=kafka.REQUEST_TIMEOUT_MS / 1000)
                newest.setdefault((meta.topic, meta.partition), []).append(meta.offset)
            self._note_offsets(session, newest)
            session.execute(
                sa.update(OutboxRow)
                .where(OutboxRow.seq.in_([row.seq for row in rows]))
                .values(published_at=sa.func.now())
            )
        return len(rows)

    def _note_offsets(self, session: Session, newest: dict[tuple[str, int], list[int]]) -> None:
        forgotten = []
        for (topic, partition), offsets in newest.items():
            known = session.get(LogPartition, (topic, partition))
            if known is None:
                session.add(LogPartition(topic=topic, partition=partition, last_offset=max(offsets)))
            elif min(offsets) <= known.last_offset:
                forgotten.append((topic, partition))
            else:
                known.last_offset = max(offsets)
        if forgotten:
            raise BrokerLostMemoryError(forgotten)

    def check_memory(self) -> None:
        """Compare the broker's end offsets with those acknowledged; republish where it forgot."""
        with self.sessions.begin() as session:
            known = session.scalars(sa.select(LogPartition)).all()
            if not known:
                return
            ends = self._end_offsets([kafka.TopicPartition(p.topic, p.partition) for p in known])
            lost = [(p.topic, p.partition) for p in known if ends.get((p.topic, p.partition), 0) <= p.last_offset]
            if lost:
                self._start_over(session, lost)

    def _start_over(self, session: Session, partitions: Sequence[tuple[str, int]]) -> None:
        """Begin a new epoch of `partitions`, and publish again what consumers lack of their topics."""
        ends = self._end_offsets([kafka.TopicPartition(*key) for key in partitions])
        for key in partitions:
            row = session.get_one(LogPartition, key)
            row.epoch += 1
            row.last_offset = ends.get(key, 0) - 1
        count = republish_unconsumed(session, sorted({topic for topic, _ in partitions}))
        log.warning("the broker lost %d partitions; %d events go out again", len(partitions), count)

    def _end_offsets(self, partitions: Sequence[kafka.TopicPartition]) -> dict[tuple[str, int], int]:
        consumer = kafka.assigned_consumer(self.bootstrap, [])
        try:
            return {(tp.topic, tp.partition): end for tp, end in consumer.end_offsets(partitions).items()}
        finally:
            consumer.close()


def republish_unconsumed(session: Session, topics: Sequence[str]) -> int:
    """Mark the events of `topics` that no consumer has applied as waiting; return how many."""
    consumed = sa.select(ConsumedEvent.event_id).where(ConsumedEvent.event_id == OutboxRow.event_id)
    result = session.execute(
        sa.update(OutboxRow)
        .where(OutboxRow.topic.in_(topics), OutboxRow.published_at.is_not(None), ~consumed.exists())
        .values(published_at=None)
    )
    return int(result.rowcount)  # type: ignore[attr-defined]


def main() -> None:
    """Run the relay as a process."""
    settings = load()
    relay = Relay(connect(settings.need("database_url"), pool_size=3), settings)
    run_until_stopped("relay", relay.run)


if __name__ == "__main__":
    main()
