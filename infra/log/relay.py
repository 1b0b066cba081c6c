"""The relay: publishes outbox rows to Kafka in order, and marks them published.

One relay publishes at a time (an advisory lock), because order per key matters more than the second
relay's throughput; any others stand by. It works on the connection that holds the lock, so a relay that lost the
lock cannot mark anything. If it dies between publishing and marking, rows are published again, which consumers
skip.

A broker may lose its memory (the embedded one keeps nothing after a stop). Two things prove it: a topic whose id is
another than before, and, the relay being the only producer, an offset that does not grow. Then the epoch of the
partition is raised, and what a consumer still lacks is published again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from kafka import KafkaProducer
from prometheus_client import Counter
from sqlalchemy.orm import Session

from infra import kafka
from infra.db import DATABASE_AWAY, Sessions, connect, locked_connection
from infra.events import dead_letter_topic
from infra.log.outbox import republish_unconsumed
from infra.process import run_until_stopped
from infra.settings import Settings, load
from infra.tables import LogPartition, OutboxRow
from infra.telemetry import tracing
from infra.telemetry.tracing import Hop

log = logging.getLogger("everloop.relay")
PUBLISHED = Counter("everloop_relay_published_events", "Events that the broker has acknowledged.", ["topic"])

RELAY_LOCK = "relay"  # whoever holds it publishes
BATCH_ROWS = 1000
BATCH_BYTES = 16 * 1024**2
IDLE_S = 0.04
QUIET_AFTER_S, QUIET_IDLE_S = 5.0, 0.1  # an idle stack does little but look
MEMORY_CHECK_S = 1.0

Place = tuple[str, int]


class BrokerLostMemoryError(Exception):
    """The broker hands out offsets that it handed out before.

    Parameters
    ----------
    places
        (topic, partition) of each place where it did.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__(f"the broker went back in {places}")
        self.places = places


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
        self.num_replicas = settings.kafka_replicas
        self.options = settings.kafka_options
        self.retention_days = settings.log_retention_days
        self._producer: KafkaProducer | None = None
        self._topic_ids: dict[str, str | None] = {}

    def run(self, stop: threading.Event) -> None:
        """Publish until told to stop; a broker that is away is tried again every second."""
        while not stop.is_set():
            try:
                with locked_connection(self.sessions, RELAY_LOCK) as connection:
                    if connection is None:
                        stop.wait(1.0)
                        continue
                    self._pump(connection, stop)
            except BrokerLostMemoryError as error:
                log.warning("%s", error)
                self._topic_ids = {}
                with self.sessions.begin() as session:
                    self._start_over(session, error.places)
            except kafka.KafkaError as error:
                log.warning("broker away (%s); events wait in the outbox", type(error).__name__)
                stop.wait(1.0)
            except DATABASE_AWAY as error:
                log.warning("database away (%s)", type(error).__name__)
                stop.wait(1.0)
            finally:
                self.close()

    def connect(self, connection: sa.Connection) -> None:
        """Open the producer, with the topics there and the broker's memory checked."""
        self.check_memory(connection)
        self._producer = kafka.producer(self.bootstrap, self.options)

    def close(self) -> None:
        """Close the producer."""
        if self._producer is not None:
            self._producer.close(timeout=1)
            self._producer = None

    def _pump(self, connection: sa.Connection, stop: threading.Event) -> None:
        self.connect(connection)
        published_s = checked_s = time.monotonic()
        while not stop.is_set():
            if self.publish_batch(connection):
                published_s = checked_s = time.monotonic()
                continue
            now_s = time.monotonic()
            stop.wait(QUIET_IDLE_S if now_s - published_s >= QUIET_AFTER_S else IDLE_S)
            if now_s - checked_s >= MEMORY_CHECK_S:
                checked_s = now_s
                if self.check_memory(connection):
                    return  # a broker that has forgotten all has forgotten who the producer is

    def publish_batch(self, connection: sa.Connection) -> int:
        """Publish the oldest waiting rows; return how many."""
        assert self._producer is not None
        with Session(connection) as session, session.begin():
            rows = _within_bytes(session.execute(_WAITING).all())
            if not rows:
                return 0
            hops = _Hops(rows)
            futures = [
                self._producer.send(row.topic, key=row.key.encode(), value=row.value, headers=hops.headers_of(row))
                for row in rows
            ]
            # Bounded: a producer that waits for a new epoch from a broker without memory expires nothing by itself.
            self._producer.flush(timeout=kafka.REQUEST_TIMEOUT_MS / 1000)
            offsets: dict[Place, list[int]] = {}
            for future in futures:
                meta = future.get(timeout=kafka.REQUEST_TIMEOUT_MS / 1000)
                offsets.setdefault((meta.topic, meta.partition), []).append(meta.offset)
            self._note_offsets(session, offsets)
            session.execute(_MARK, {"seqs": [row.seq for row in rows]})
        hops.end()
        for row in rows:
            PUBLISHED.labels(row.topic).inc()
        return len(rows)

    def _note_offsets(self, session: Session, newest: dict[Place, list[int]]) -> None:
        forgotten = []
        for (topic, partition), offsets in newest.items():
            known = session.get(LogPartition, (topic, partition))
            if known is None:
                session.add(
                    LogPartition(
                        topic=topic,
                        partition=partition,
                        last_offset=max(offsets),
                        topic_id=self._topic_ids.get(topic),
                    )
                )
            elif min(offsets) <= known.last_offset:
                forgotten.append((topic, partition))
            else:
                known.last_offset = max(offsets)
        if forgotten:
            raise BrokerLostMemoryError(forgotten)

    def check_memory(self, connection: sa.Connection) -> bool:
        """Compare the topics' ids with those that were published to; republish where the broker forgot.

        Returns
        -------
        bool
            Whether it has forgotten any.
        """
        self._topic_ids = kafka.ensure_topics(
            self.bootstrap, self.num_partitions, self.retention_days, self.num_replicas, self.options
        )
        with Session(connection) as session, session.begin():
            lost = []
            for known in session.scalars(sa.select(LogPartition)):
                if known.topic_id is None:
                    known.topic_id = self._topic_ids.get(known.topic)
                elif known.topic_id != self._topic_ids.get(known.topic):
                    lost.append((known.topic, known.partition))
            if lost:
                self._start_over(session, lost)
        return bool(lost)

    def _start_over(self, session: Session, places: Sequence[Place]) -> None:
        """Begin a new epoch of `places`, and publish again what consumers lack of their topics."""
        for place in places:
            row = session.get_one(LogPartition, place)
            row.epoch += 1
            row.last_offset = -1
            row.topic_id = self._topic_ids.get(row.topic)
        topics = {topic for topic, _ in places}
        count = republish_unconsumed(session, sorted(topics))
        count += _republish_dead(session, topics)
        log.warning("the broker lost %d partitions; %d events go out again", len(places), count)


_WAITING = (
    sa.select(OutboxRow.seq, OutboxRow.topic, OutboxRow.key, OutboxRow.value, OutboxRow.headers)
    .where(OutboxRow.published_at.is_(None))
    .order_by(OutboxRow.seq)
    .limit(BATCH_ROWS)
)
_MARK = sa.text("UPDATE outbox SET published_at = now() WHERE seq = ANY(:seqs)")


class _Hops:
    """The spans of events that are being published; consumers go on from them. Where it fails, none is sent."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._by_seq: dict[int, Hop] = {}
        for row in rows if tracing.is_on() else ():
            parent = tracing.valid((row.headers or {}).get(tracing.HEADER))
            if parent is not None:
                hop = tracing.begin(f"publish {row.topic}", "PRODUCER", parent, everloop__outbox_seq=row.seq)
                assert hop is not None
                self._by_seq[row.seq] = hop

    def headers_of(self, row: Any) -> list[tuple[str, bytes]]:
        """Return a row's headers, with the trace as it goes on from here."""
        headers = dict(row.headers or {})
        if row.seq in self._by_seq:
            headers[tracing.HEADER] = self._by_seq[row.seq].traceparent
        return [(name, text.encode()) for name, text in headers.items()]

    def end(self) -> None:
        for hop in self._by_seq.values():
            hop.end()


def _within_bytes(rows: Sequence[Any]) -> list[Any]:
    """Return the rows that together are not larger than a batch may be; always the first."""
    chosen: list[Any] = []
    size_bytes = 0
    for row in rows:
        size_bytes += len(row.value)
        if chosen and size_bytes > BATCH_BYTES:
            break
        chosen.append(row)
    return chosen


def _republish_dead(session: Session, topics: set[str]) -> int:
    """Mark the dead letters of forgotten dead-letter topics as waiting: no consumer of ours asks for them."""
    dead = [topic for topic in topics if topic.endswith(dead_letter_topic(""))]
    result = session.execute(sa.update(OutboxRow).where(OutboxRow.topic.in_(dead)).values(published_at=None))
    return int(result.rowcount)  # type: ignore[attr-defined]


def main() -> None:
    """Run the relay as a process."""
    settings = load()
    relay = Relay(connect(settings.need("database_url"), pool_size=3), settings)
    run_until_stopped("relay", relay.run, settings)


if __name__ == "__main__":
    main()
