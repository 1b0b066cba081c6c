"""The outbox: an event is written in the transaction of the change that it reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.events import Event
from infra.sealing import SubjectKey
from infra.tables import ConsumedEvent, ConsumerRow, OutboxRow
from infra.telemetry.tracing import HEADER, MAX_LINKS


@dataclass(frozen=True, slots=True)
class Entry:
    """An event to be written.

    Parameters
    ----------
    key
        Kafka key; events of one key keep their order.
    event_id
        By which a second delivery is known; a new one, if unset.
    subject
        Seals the personal fields, for events that have some.
    """

    event: Event
    key: str
    event_id: str | None = None
    subject: SubjectKey | None = None


def append(
    session: Session, event: Event, *, key: str, event_id: str | None = None, subject: SubjectKey | None = None
) -> None:
    """Add one event within the caller's transaction; see :class:`Entry`."""
    append_many(session, [Entry(event, key, event_id, subject)])


def append_many(session: Session, entries: Iterable[Entry]) -> None:
    """Add events within the caller's transaction, in their order."""
    written = columns(entries)
    if written["event_ids"]:
        # One statement for all of them: a statement per row would cost more than all the rest.
        session.execute(_INSERT, written)


def columns(entries: Iterable[Entry]) -> dict[str, list[Any]]:
    """Return the columns of events as parameters of a statement that selects from :data:`UNNEST`."""
    written: dict[str, list[Any]] = {"event_ids": [], "topics": [], "keys": [], "values": [], "headers": []}
    for entry in entries:
        envelope = entry.event.to_cloudevent(entry.event_id, entry.subject)
        written["event_ids"].append(envelope["id"])
        written["topics"].append(entry.event.topic)
        written["keys"].append(entry.key)
        written["values"].append(orjson.dumps(envelope))
        traceparent = entry.event.traceparent
        written["headers"].append(None if traceparent is None else orjson.dumps({HEADER: traceparent}).decode())
    return written


UNNEST = (
    "unnest(CAST(:event_ids AS text[]), CAST(:topics AS text[]), CAST(:keys AS text[]), CAST(:values AS bytea[]), "
    "CAST(:headers AS jsonb[])) WITH ORDINALITY AS event(event_id, topic, key, value, headers, place)"
)
_INSERT = sa.text(
    "INSERT INTO outbox (event_id, topic, key, value, headers) "
    f"SELECT event_id, topic, key, value, headers FROM {UNNEST} ORDER BY place"
)


def traceparents(session: Session, event_ids: Sequence[str]) -> list[str]:
    """Return the traces of events that the log still has, the newest first."""
    header = OutboxRow.headers[HEADER].astext
    query = sa.select(header).where(OutboxRow.event_id.in_(event_ids), header.is_not(None))
    return list(session.scalars(query.order_by(OutboxRow.seq.desc()).limit(MAX_LINKS)))


def republish(session: Session, from_seq: int, topics: Sequence[str] = ()) -> int:
    """Mark published events as waiting again, from `from_seq` on; return how many.

    Consumers that have applied an event skip it.
    """
    wanted = sa.update(OutboxRow).where(OutboxRow.seq >= from_seq, OutboxRow.published_at.is_not(None))
    if topics:
        wanted = wanted.where(OutboxRow.topic.in_(topics))
    return int(session.execute(wanted.values(published_at=None)).rowcount)  # type: ignore[attr-defined]


def republish_unconsumed(session: Session, topics: Sequence[str]) -> int:
    """Mark the events of `topics` that some consumer still lacks as waiting again; return how many."""
    result = session.execute(
        sa.update(OutboxRow)
        .where(OutboxRow.topic.in_(topics), OutboxRow.published_at.is_not(None), lacked_by_some())
        .values(published_at=None)
    )
    return int(result.rowcount)  # type: ignore[attr-defined]


def lacked_by_some() -> sa.ColumnElement[bool]:
    """Return the condition that a known consumer of the row's topic has not applied it."""
    # Correlated by name: two levels down, SQLAlchemy would take the row for any row of the outbox.
    applied = (
        sa.select(ConsumedEvent.event_id)
        .where(ConsumedEvent.consumer == ConsumerRow.name, ConsumedEvent.event_id == OutboxRow.event_id)
        .correlate(ConsumerRow, OutboxRow)
    )
    return (
        sa.select(ConsumerRow.name)
        .where(OutboxRow.topic == sa.any_(ConsumerRow.topics), ~applied.exists())
        .correlate(OutboxRow)
        .exists()
    )
