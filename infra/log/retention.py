"""Retention: the log keeps events for a time and up to a size, and never loses what a consumer still needs."""

from __future__ import annotations

import logging
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.db import Sessions
from infra.errors import ConflictError, NotFoundError
from infra.log import leases
from infra.log.outbox import lacked_by_some
from infra.settings import Settings
from infra.tables import ConsumedEvent, ConsumerPosition, ConsumerRow, OutboxRow

log = logging.getLogger("everloop.retention")

CHUNK_ROWS = 10_000
# A broker may deliver an event once more for as long as it keeps it; until then its being applied is remembered.
REMEMBER_TIMES = 2


def prune(sessions: Sessions, settings: Settings) -> int:
    """Delete published events past their time or over the size, and return how many.

    An event that a known consumer has not applied stays, however old and however large the log.
    """
    keep_for = timedelta(days=settings.log_retention_days)
    old = OutboxRow.created_at < sa.func.now() - keep_for
    count = _delete(sessions, old)
    with sessions() as session:
        boundary = _size_boundary(session, settings.log_max_bytes)
    if boundary is not None:
        count += _delete(sessions, OutboxRow.seq <= boundary)
    with sessions.begin() as session:
        session.execute(
            sa.delete(ConsumedEvent).where(
                ConsumedEvent.consumed_at < sa.func.now() - keep_for * REMEMBER_TIMES,
                ~sa.select(OutboxRow.seq).where(OutboxRow.event_id == ConsumedEvent.event_id).exists(),
            )
        )
    if count:
        log.info("pruned %d events", count)
    return count


def _delete(sessions: Sessions, condition: sa.ColumnElement[bool]) -> int:
    count = 0
    while True:
        with sessions.begin() as session:
            chunk = (
                sa.select(OutboxRow.seq)
                .where(condition, OutboxRow.published_at.is_not(None), ~lacked_by_some())
                .order_by(OutboxRow.seq)
                .limit(CHUNK_ROWS)
            )
            result = session.execute(sa.delete(OutboxRow).where(OutboxRow.seq.in_(chunk)))
        num_deleted = int(result.rowcount)  # type: ignore[attr-defined]
        count += num_deleted
        if num_deleted < CHUNK_ROWS:
            return count


def _size_boundary(session: Session, max_bytes: int) -> int | None:
    """Return the newest seq that lies beyond the size, counted from the newest event back."""
    size_bytes = session.scalar(sa.select(sa.func.sum(sa.func.octet_length(OutboxRow.value)))) or 0
    if size_bytes <= max_bytes:
        return None
    running = sa.func.sum(sa.func.octet_length(OutboxRow.value)).over(order_by=OutboxRow.seq.desc())
    sizes = sa.select(OutboxRow.seq, running.label("size_bytes")).subquery()
    boundary: int | None = session.scalar(sa.select(sa.func.max(sizes.c.seq)).where(sizes.c.size_bytes > max_bytes))
    return boundary


def retire(session: Session, consumer: str) -> None:
    """Forget a consumer that will not come back, so that the log keeps nothing for it.

    Raises
    ------
    NotFoundError
        Code ``consumer_not_found``.
    ConflictError
        Code ``consumer_running``.
    """
    row = session.get(ConsumerRow, consumer)
    if row is None:
        names = ", ".join(session.scalars(sa.select(ConsumerRow.name).order_by(ConsumerRow.name)))
        raise NotFoundError(f"There is no consumer {consumer!r}; there are {names}.", code="consumer_not_found")
    if leases.num_members(session.connection(), consumer):
        raise ConflictError(f"{consumer} is running; stop its processes first.", code="consumer_running")
    session.delete(row)
    session.execute(sa.delete(ConsumerPosition).where(ConsumerPosition.consumer == consumer))
    session.execute(sa.delete(ConsumedEvent).where(ConsumedEvent.consumer == consumer))
