"""One worker loop for all consumers: handle, deduplicate, and keep the position with the effect.

The handler's effect, the record that the event was applied, and the position commit in one transaction, a batch of
events at a time: whatever dies when, each event counts exactly once. The position moves by compare-and-swap, so of
two processes that believe to own a partition only one can commit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from kafka import KafkaConsumer
from pydantic import ValidationError
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from infra import kafka
from infra.db import DATABASE_AWAY, Sessions
from infra.errors import InvalidRequestError
from infra.events import Event
from infra.kafka import TopicPartition
from infra.log import dead_letters, outbox, reading
from infra.log.effects import GIVEN_UP, Effects
from infra.log.leases import Leases
from infra.log.reading import UnreadableEventError
from infra.settings import Settings
from infra.tables import ConsumerPosition, ConsumerRow, LogPartition

log = logging.getLogger("everloop.consumer")

MAX_TRIES = 3
RETRY_PAUSE_S = 1.0
BATCH_EVENTS = 500
BALANCE_EVERY_S = 1.0
LINGER_S = 0.02
EVERYTHING = "*"


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that this consumer has not applied before."""

    event: Any
    event_id: str


Handler = Callable[[Session, Sequence[Delivery]], None]
Polled = Mapping[TopicPartition, Sequence[Any]]


class EpochChangedError(Exception):
    """The broker lost its memory; positions start over."""


class PositionMovedError(Exception):
    """Another process moved the position; what this one did is rolled back."""


class Consumer:
    """Applies the events of some topics, each exactly once.

    Parameters
    ----------
    name
        Identity of the consumer; positions and applied events are kept under it.
    handlers
        For each event class, a function of (session, deliveries of that class in order) that makes its effect
        through the session and nowhere else. Of the events that came together, those of the first class go first.
    exclusive
        One process works at a time and the others stand by (for a state in memory). Otherwise the processes share
        the partitions.
    public
        The handlers need nothing that is sealed, so they also see events whose sealed part was erased.
    batch_events
        How many events one transaction takes at most.
    linger_s
        How long it waits after a small transaction, so that what comes in that time shares the next one.
    on_rollback
        Called when a handler's transaction was rolled back, to drop what it changed in memory.
    """

    def __init__(
        self,
        name: str,
        sessions: Sessions,
        settings: Settings,
        handlers: Mapping[type[Event], Handler],
        *,
        exclusive: bool = False,
        public: bool = False,
        batch_events: int = BATCH_EVENTS,
        linger_s: float = LINGER_S,
        on_rollback: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.sessions = sessions
        self.bootstrap = settings.need("kafka_bootstrap")
        self.options = settings.kafka_options
        self.handlers = dict(handlers)
        self.topics = sorted({event.topic for event in handlers})
        self._order = {event: number for number, event in enumerate(handlers)}
        self.exclusive = exclusive
        self.public = public
        self.batch_events = batch_events
        self.linger_s = linger_s
        self.on_rollback = on_rollback
        self._leases: Leases
        self._positions: dict[TopicPartition, tuple[int, int]] = {}

    def run(self, stop: threading.Event) -> None:
        """Consume until told to stop; a broker or database that is away is tried again."""
        while not stop.is_set():
            try:
                with Leases(self.sessions.kw["bind"], self.name) as self._leases:
                    self.on_rollback()
                    self._register()
                    self._consume(stop)
            except (EpochChangedError, PositionMovedError) as error:
                log.warning("%s: %s; starting from what is committed", self.name, type(error).__name__)
            except (kafka.KafkaError, *DATABASE_AWAY) as error:
                log.warning("%s: %s; trying again", self.name, type(error).__name__)
                stop.wait(1.0)

    def _register(self) -> None:
        """Make the log know this consumer, and send it what a broker forgot before it was known."""
        with self.sessions.begin() as session:
            values = {"topics": self.topics}
            known = session.get(ConsumerRow, self.name)
            session.execute(
                insert(ConsumerRow)
                .values(name=self.name, **values)
                .on_conflict_do_update(index_elements=["name"], set_=values)
            )
            gained = sorted(set(self.topics).difference(known.topics if known else ()))
            forgotten = sa.select(LogPartition.topic).where(LogPartition.topic.in_(gained), LogPartition.epoch > 0)
            if gained and (topics := set(session.scalars(forgotten))):
                outbox.republish_unconsumed(session, sorted(topics))

    def _consume(self, stop: threading.Event) -> None:
        client = kafka.consumer(self.bootstrap, self.options)
        try:
            balanced_at_s = -BALANCE_EVERY_S
            while not stop.is_set():
                if time.monotonic() - balanced_at_s >= BALANCE_EVERY_S:
                    balanced_at_s = time.monotonic()
                    self._balance(client)
                    self._check_epochs()
                if not self._positions:
                    stop.wait(0.1)
                    continue
                polled = client.poll(timeout_ms=100, max_records=self.batch_events)
                if polled:
                    self._apply({p: records for p, records in polled.items() if p in self._positions}, stop)
                    if sum(map(len, polled.values())) < self.batch_events // 2:
                        stop.wait(self.linger_s)
        finally:
            self._positions = {}
            client.close()

    def _balance(self, client: KafkaConsumer) -> None:
        existing = kafka.partitions(client, self.topics)
        if self.exclusive:
            held = self._leases.balance([EVERYTHING])
            mine = set(existing) if held else set()
        else:
            held = self._leases.balance([f"{p.topic}/{p.partition}" for p in existing])
            mine = {p for p in existing if f"{p.topic}/{p.partition}" in held}
        if mine == set(self._positions):
            return
        client.assign(sorted(mine))
        if not mine.issuperset(self._positions) or self.exclusive:
            self.on_rollback()
        self._positions = self._committed(mine)
        self._ask_for_what_was_dropped(client)
        for partition, (_, next_offset) in self._positions.items():
            client.seek(partition, next_offset)

    def _ask_for_what_was_dropped(self, client: KafkaConsumer) -> None:
        """Have the log send again what Kafka dropped before this consumer came to it."""
        if not self._positions:
            return
        begins = kafka.beginnings(client, self._positions)
        dropped = {p.topic for p, (_, next_offset) in self._positions.items() if begins.get(p, 0) > next_offset}
        if dropped:
            with self.sessions.begin() as session:
                count = outbox.republish_unconsumed(session, sorted(dropped))
            log.warning("%s: Kafka dropped what it lacks of %s; %d events go out again", self.name, dropped, count)

    def _committed(self, partitions: set[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        """Return (epoch, next offset) of each partition; where the broker forgot, from its beginning."""
        positions = {}
        with self.sessions.begin() as session:
            epochs = self._epochs(session)
            for partition in partitions:
                place = (self.name, partition.topic, partition.partition)
                epoch = epochs.get(partition, 0)
                row = session.get(ConsumerPosition, place, with_for_update=True)
                if row is None:
                    row = ConsumerPosition(
                        consumer=self.name, topic=partition.topic, partition=partition.partition, next_offset=0
                    )
                    session.add(row)
                if row.epoch != epoch:
                    row.epoch, row.next_offset = epoch, 0
                session.flush()
                positions[partition] = (epoch, row.next_offset)
        return positions

    def _epochs(self, session: Session) -> dict[TopicPartition, int]:
        rows = session.execute(
            sa.select(LogPartition.topic, LogPartition.partition, LogPartition.epoch).where(
                LogPartition.topic.in_(self.topics)
            )
        )
        return {TopicPartition(topic, partition): epoch for topic, partition, epoch in rows}

    def _check_epochs(self) -> None:
        with self.sessions() as session:
            epochs = self._epochs(session)
        if any(epochs.get(partition, 0) != epoch for partition, (epoch, _) in self._positions.items()):
            raise EpochChangedError

    def _apply(self, polled: Polled, stop: threading.Event) -> None:
        try:
            self.apply(polled)
        except (*DATABASE_AWAY, PositionMovedError):
            self.on_rollback()
            raise
        except Exception as error:
            self.on_rollback()
            log.warning("%s: a batch failed (%s); one by one", self.name, type(error).__name__)
            for partition, records in polled.items():
                for record in records:
                    if stop.is_set():
                        return
                    self._apply_with_retries(partition, record)

    def _apply_with_retries(self, partition: TopicPartition, record: Any) -> None:
        for attempt in range(1, MAX_TRIES + 1):
            try:
                self.apply({partition: [record]})
                return
            except (*DATABASE_AWAY, PositionMovedError):
                self.on_rollback()
                raise
            except Exception as error:
                self.on_rollback()
                log.error("%s: %s at %s/%d", self.name, type(error).__name__, record.topic, record.offset)
                # What cannot be read, or is refused, will be later too; anything else may pass.
                hopeless = isinstance(error, UnreadableEventError | ValidationError | InvalidRequestError)
                if attempt == MAX_TRIES or hopeless:
                    self._give_up(partition, record, error, attempt)
                    return
                time.sleep(RETRY_PAUSE_S * attempt)

    def apply(self, polled: Polled) -> None:
        """Handle records in one transaction with their positions; skip what was applied before."""
        envelopes = [reading.parse(r.value, r.headers) for records in polled.values() for r in records]
        positions = {p: (self._positions[p][0], records[-1].offset + 1) for p, records in polled.items()}
        with Effects(self.name) as effects, Session(self._leases.connection) as session, session.begin():
            fresh = reading.claim(session, self.name, envelopes)
            opened = list(reading.open_all(session, fresh, self.handlers, public=self.public))
            effects.follow(opened)
            # By class, in the handlers' order: what is about one thing stays in order within its partition.
            opened.sort(key=lambda pair: self._order[pair[0].event_class])
            for event_class, group in groupby(opened, key=lambda pair: pair[0].event_class):
                deliveries = [Delivery(event, envelope.event_id) for envelope, event in group]
                self.handlers[event_class](session, deliveries)
            for partition, position in sorted(positions.items()):
                self._move(session, partition, position)
        self._positions |= positions

    def _move(self, session: Session, partition: TopicPartition, position: tuple[int, int]) -> None:
        epoch, next_offset = self._positions[partition]
        # A broker that lost its memory begins anew: what it has at the old offset is not what comes next.
        of_broker = sa.select(LogPartition.epoch).where(
            LogPartition.topic == partition.topic, LogPartition.partition == partition.partition
        )
        moved = session.execute(
            sa.update(ConsumerPosition)
            .where(
                ConsumerPosition.consumer == self.name,
                ConsumerPosition.topic == partition.topic,
                ConsumerPosition.partition == partition.partition,
                ConsumerPosition.epoch == epoch,
                ConsumerPosition.next_offset == next_offset,
                sa.func.coalesce(of_broker.scalar_subquery(), 0) == epoch,
            )
            .values(epoch=position[0], next_offset=position[1])
        )
        if moved.rowcount != 1:  # type: ignore[attr-defined]
            raise PositionMovedError

    def _give_up(self, partition: TopicPartition, record: Any, error: Exception, tries: int) -> None:
        position = (self._positions[partition][0], record.offset + 1)
        with Session(self._leases.connection) as session, session.begin():
            dead_letters.add(session, self.name, record, error, tries)
            self._move(session, partition, position)
        self._positions[partition] = position
        GIVEN_UP.labels(self.name).inc()
