"""One worker loop for all consumers: handle, deduplicate, and keep the position with the effect.

The handler's effect, the record that the event was applied, and the position commit in one transaction:
whatever dies when, each event counts exactly once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from kafka import KafkaConsumer
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from infra import kafka
from infra.db import Sessions, advisory_lock
from infra.events import Event, dead_letter_topic
from infra.settings import Settings
from infra.tables import ConsumedEvent, ConsumerPosition, LogPartition

log = logging.getLogger("everloop.consumer")

Handler = Callable[[Session, Any, str], None]
MAX_TRIES = 3
RETRY_PAUSE_S = 1.0


class UnreadableEventError(Exception):
    """The event is not JSON, not of its schema, or of an unknown version."""


class EpochChangedError(Exception):
    """The broker lost its memory; positions start over."""


class Consumer:
    """Applies the events of some topics, each exactly once.

    Parameters
    ----------
    name
        Identity of the consumer; positions and applied events are kept under it.
    handlers
        For each event class, a function of (session, event, event id) that makes its effect through the
        session and nowhere else.
    on_rollback
        Called when a handler's transaction was rolled back, to drop what it changed in memory.
    """

    def __init__(
        self,
        name: str,
        sessions: Sessions,
        settings: Settings,
        handlers: Mapping[type[Event], Handler],
        on_rollback: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.sessions = sessions
        self.bootstrap = settings.need("kafka_bootstrap")
        self.handlers = {event.topic: (event, handler) for event, handler in handlers.items()}
        self.on_rollback = on_rollback

    def run(self, stop: threading.Event) -> None:
        """Consume until told to stop; a broker or database that is away is tried again."""
        while not stop.is_set():
            try:
                # Two workers of one name would each hold a reward state of their own.
                with advisory_lock(self.sessions, f"consumer.{self.name}") as held:
                    if held:
                        self.on_rollback()
                        self._consume(stop)
                    else:
                        stop.wait(1.0)
            except EpochChangedError:
                log.warning("%s: the log started over", self.name)
            except (kafka.KafkaError, OperationalError, InterfaceError) as error:
                log.warning("%s: %s; trying again", self.name, type(error).__name__)
                stop.wait(1.0)

    def _consume(self, stop: threading.Event) -> None:
        consumer = kafka.assigned_consumer(self.bootstrap, self.handlers)
        try:
            if {tp.topic for tp in consumer.assignment()} != set(self.handlers):
                stop.wait(0.5)  # the relay has not created the topics yet
                return
            epochs = self._seek(consumer)
            while not stop.is_set():
                for partition, records in consumer.poll(timeout_ms=200, max_records=50).items():
                    for record in records:
                        self._apply_with_retries(record, epochs.get((partition.topic, partition.partition), 0))
                        if stop.is_set():
                            return
                self._check_epochs(epochs)
        finally:
            consumer.close()

    def _seek(self, consumer: KafkaConsumer) -> dict[tuple[str, int], int]:
        epochs = self._epochs()
        with self.sessions() as session:
            rows = session.scalars(sa.select(ConsumerPosition).where(ConsumerPosition.consumer == self.name)).all()
        positions = {(row.topic, row.partition): row for row in rows}
        for tp in consumer.assignment():
            row = positions.get((tp.topic, tp.partition))
            if row is not None and row.epoch == epochs.get((tp.topic, tp.partition), 0):
                consumer.seek(tp, row.next_offset)
            else:
                consumer.seek_to_beginning(tp)
        return epochs

    def _epochs(self) -> dict[tuple[str, int], int]:
        with self.sessions() as session:
            rows = session.scalars(sa.select(LogPartition).where(LogPartition.topic.in_(self.handlers))).all()
        return {(row.topic, row.partition): row.epoch for row in rows}

    def _check_epochs(self, epochs: dict[tuple[str, int], int]) -> None:
        for key, epoch in self._epochs().items():
            if epochs.setdefault(key, epoch) != epoch:
                raise EpochChangedError

    def _apply_with_retries(self, record: Any, epoch: int) -> None:
        for attempt in range(1, MAX_TRIES + 1):
            try:
                self.apply(record, epoch)
                return
            except (OperationalError, InterfaceError):
                self.on_rollback()
                raise
            except Exception as error:
                self.on_rollback()
                log.error("%s: %s from %s", self.name, type(error).__name__, record.topic)
                # An event that cannot be read will not be readable later; anything else may pass.
                if attempt == MAX_TRIES or isinstance(error, UnreadableEventError):
                    self._dead_letter(record, epoch)
                    return
                time.sleep(RETRY_PAUSE_S * attempt)

    def apply(self, record: Any, epoch: int) -> None:
        """Handle one record in one transaction with its position; skip what was applied before."""
        event_class, handler = self.handlers[record.topic]
        event_id, event = self._read(record, event_class)
        with self.sessions.begin() as session:
            fresh = session.execute(
                insert(ConsumedEvent)
                .values(consumer=self.name, event_id=event_id)
                .on_conflict_do_nothing()
                .returning(ConsumedEvent.event_id)
            ).scalar()
            if fresh is not None:
                handler(session, event, event_id)
            self._note_position(session, record, epoch)

    @staticmethod
    def _read(record: Any, event_class: type[Event]) -> tuple[str, Event]:
        try:
            envelope = json.loads(record.value)
            return str(envelope["id"]), event_class.from_cloudevent(envelope)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnreadableEventError(str(error)) from error

    def _note_position(self, session: Session, record: Any, epoch: int) -> None:
        values = {"next_offset": record.offset + 1, "epoch": epoch}
        session.execute(
            insert(ConsumerPosition)
            .values(consumer=self.name, topic=record.topic, partition=record.partition, **values)
            .on_conflict_do_update(index_elements=["consumer", "topic", "partition"], set_=values)
        )

    def _note_dead(self, session: Session, record: Any) -> None:
        """Mark an event of ours as given up, so that nobody waits for it."""
        try:
            event_id = str(json.loads(record.value)["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        session.execute(
            insert(ConsumedEvent)
            .values(consumer=self.name, event_id=event_id, dead_letter=True)
            .on_conflict_do_nothing()
        )

    def _dead_letter(self, record: Any, epoch: int) -> None:
        reason = traceback.format_exc(limit=8)
        with self.sessions.begin() as session:
            self._note_position(session, record, epoch)
            self._note_dead(session, record)
            producer = kafka.producer(self.bootstrap)
            try:
                headers = [("reason", reason.encode()), ("offset", str(record.offset).encode())]
                producer.send(
                    dead_letter_topic(record.topic), key=record.key, value=record.value, headers=headers
                ).get(timeout=kafka.REQUEST_TIMEOUT_MS / 1000)
            finally:
                producer.close()
