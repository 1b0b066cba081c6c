"""Dead letters: what a consumer gave up, why, and what an operator may do about it."""

from __future__ import annotations

import traceback
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from infra import kafka
from infra.errors import ConflictError, EverloopError, NotFoundError
from infra.events import dead_letter_topic
from infra.ids import new_id
from infra.log import reading
from infra.log.reading import UnreadableEventError
from infra.tables import ConsumedEvent, DeadLetter, OutboxRow

STACK_FRAMES = 12
# Brokers take 1 MB by default, headers included. A copy that one refuses would hold up the relay for good.
MAX_COPY_BYTES = 512 * 1024
MAX_KEY_CHARS = 1000


def add(session: Session, consumer: str, record: Any, error: Exception, tries: int) -> None:
    """Give a record up within the caller's transaction: a row here, a copy on the dead-letter topic.

    The copy of a large record has no value, and its size in the header ``left_out_bytes``; the row has it all.
    """
    event_id = _event_id(record.value)
    reason = describe(error)
    value = record.value or b""
    headers = {"reason": reason, "consumer": consumer, "place": f"{record.partition}/{record.offset}"}
    if len(value) > MAX_COPY_BYTES:
        headers["left_out_bytes"] = str(len(value))
    session.add(
        DeadLetter(
            consumer=consumer,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            event_id=event_id,
            key=record.key,
            value=value,
            reason=reason,
            # Frames only: the message of an exception may quote what a person said.
            stack="".join(traceback.format_tb(error.__traceback__)[-STACK_FRAMES:]),
            tries=tries,
        )
    )
    session.add(
        OutboxRow(
            event_id=new_id("dl"),
            topic=dead_letter_topic(record.topic),
            key=_key(record.key),
            value=b"" if "left_out_bytes" in headers else value,
            headers=headers,
        )
    )
    if event_id is not None:
        # Nobody waits for it any more.
        session.execute(
            insert(ConsumedEvent)
            .values(consumer=consumer, event_id=event_id, dead_letter=True)
            .on_conflict_do_nothing()
        )


def describe(error: Exception) -> str:
    """Return a reason that quotes nothing that a person said."""
    if isinstance(error, UnreadableEventError):
        return str(error)
    if isinstance(error, EverloopError):
        return f"{type(error).__name__} [{error.code}]"
    return type(error).__name__


def _key(key: bytes | None) -> str:
    """Return a key that PostgreSQL can hold, whatever somebody wrote."""
    return (key or b"").decode(errors="replace").replace("\x00", "")[:MAX_KEY_CHARS]


def _event_id(value: bytes | None) -> str | None:
    """Return the id even of an event whose schema is unknown here: a later version may read it."""
    try:
        return reading.event_id_of(orjson.loads(value or b""))
    except (orjson.JSONDecodeError, UnreadableEventError):
        return None


def find(session: Session, letter_id: int) -> DeadLetter:
    """Return a dead letter.

    Raises
    ------
    NotFoundError
        Code ``dead_letter_not_found``.
    """
    letter = session.get(DeadLetter, letter_id, with_for_update=True)
    if letter is None:
        raise NotFoundError(
            f"There is no dead letter {letter_id}; see `everloop log dead list`.", code="dead_letter_not_found"
        )
    return letter


def retry(session: Session, letter_id: int) -> None:
    """Send a dead letter to its consumer again; the others, which have applied it, skip it.

    Raises
    ------
    ConflictError
        Code ``dead_letter_closed`` where it was retried or dropped before, ``dead_letter_unreadable`` where no
        try can help, ``dead_letter_too_large`` where the relay could not send it.
    """
    letter = _open(session, letter_id)
    if len(letter.value) > kafka.MAX_EVENT_BYTES - MAX_COPY_BYTES:
        raise ConflictError(
            f"Dead letter {letter_id} has {len(letter.value)} bytes, more than the relay sends; drop it.",
            code="dead_letter_too_large",
        )
    if letter.event_id is None:
        raise ConflictError(
            f"Dead letter {letter_id} is no event ({letter.reason}); drop it.",
            code="dead_letter_unreadable",
        )
    session.execute(
        sa.delete(ConsumedEvent).where(
            ConsumedEvent.consumer == letter.consumer, ConsumedEvent.event_id == letter.event_id
        )
    )
    row = insert(OutboxRow).values(
        event_id=letter.event_id,
        topic=letter.topic,
        key=_key(letter.key),
        value=letter.value,
    )
    session.execute(row.on_conflict_do_update(index_elements=["event_id"], set_={"published_at": None}))
    letter.state = "retried"


def drop(session: Session, letter_id: int) -> None:
    """Close a dead letter for good; its event stays given up.

    Raises
    ------
    ConflictError
        Code ``dead_letter_closed`` where it was retried or dropped before.
    """
    letter = _open(session, letter_id)
    letter.state, letter.value = "dropped", b""


def _open(session: Session, letter_id: int) -> DeadLetter:
    letter = find(session, letter_id)
    if letter.state != "open":
        raise ConflictError(f"Dead letter {letter_id} was {letter.state} before.", code="dead_letter_closed")
    return letter
