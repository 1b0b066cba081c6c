"""The projection of the log behind receipts.

Each event adds its part, whatever the order in which the topics arrive, so the tables can be rebuilt from the log
with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.tables import Feedback, ReceiptFate, ReceiptRow, ReceiptRun, ReceiptUse
from infra.db import ManyRows
from infra.events import (
    DeploymentChanged,
    Event,
    FeedbackGiven,
    RewardUpdated,
    RunEnded,
    SignalSetAside,
    TrainingUsed,
)
from infra.log import reading
from infra.log.consumer import Delivery, Handler
from infra.log.reading import UnreadableEventError
from infra.tables import OutboxRow

CONSUMER = "receipts"
REBUILD_ROWS = 1000

# What an act on a release makes of it. A canary that ends without a decision leaves it where it was: not promoted.
FATES = {
    "canary_opened": "canary",
    "promoted": "promoted",
    "promoted_by_hand": "promoted",
    "canary_rolled_back": "rolled_back",
    "canary_ended": "not_promoted",
    "rolled_back_by_hand": "rolled_back",
    "quarantined": "quarantined",
}


def on_given(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note accepted signals."""
    session.execute(
        _NOTE_GIVEN,
        {
            "feedback_ids": [delivery.event.feedback_id for delivery in deliveries],
            "episode_ids": [delivery.event.episode_id for delivery in deliveries],
        },
    )


_NOTE_GIVEN = sa.text(
    "INSERT INTO receipts (feedback_id, episode_id, status) SELECT *, 'accepted' FROM unnest("
    "CAST(:feedback_ids AS text[]), CAST(:episode_ids AS text[])) AS row(feedback_id) ORDER BY feedback_id "
    "ON CONFLICT DO NOTHING"
)


# What another event wrote gives way.
_RECEIPTS = ManyRows(
    "receipts",
    {
        "feedback_id": "text",
        "episode_id": "text",
        "status": "text",
        "reason": "text",
        "update_seq": "bigint",
        "p_before": "float8",
        "p_after": "float8",
    },
    key="feedback_id",
)


def on_learned(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note what the reward model learned from."""
    newest = {d.event.feedback_id: d.event for d in deliveries if d.event.feedback_id is not None}
    _RECEIPTS.write(
        session,
        [
            {
                "feedback_id": event.feedback_id,
                "episode_id": event.episode_id,
                "status": "learned",
                "update_seq": event.update_seq,
                "p_before": event.p_before,
                "p_after": event.p_good,
            }
            for event in newest.values()
        ],
    )


def on_set_aside(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note what the reward model did not use, and why."""
    newest = {d.event.feedback_id: d.event for d in deliveries}
    _RECEIPTS.write(
        session,
        [
            {"feedback_id": e.feedback_id, "episode_id": e.episode_id, "status": "set_aside", "reason": e.reason}
            for e in newest.values()
        ],
    )


def on_used(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note which signals a run's dataset holds."""
    for event in (delivery.event for delivery in deliveries):
        rows = [
            {
                "feedback_id": feedback_id,
                "run_id": event.run_id,
                "role": event.role,
                "dataset_digest": event.dataset_digest,
                "reward_snapshot_id": event.reward_snapshot_id,
            }
            for feedback_id in event.feedback_ids
        ]
        if rows:
            session.execute(insert(ReceiptUse).on_conflict_do_nothing(), rows)


def on_run_ended(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note how runs ended."""
    for event in (delivery.event for delivery in deliveries):
        values = {name: getattr(event, name) for name in ("status", "release", "adapter_digest", "reason")}
        session.execute(
            insert(ReceiptRun)
            .values(run_id=event.run_id, **values)
            .on_conflict_do_update(index_elements=["run_id"], set_=values)
        )


def on_deployment(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note what became of releases; a later version of the head outweighs an earlier one."""
    for event in (delivery.event for delivery in deliveries):
        fate = FATES.get(event.action)
        if fate is None or event.release is None:
            continue
        values = {"fate": fate, "reason": event.reason, "head_version": event.head_version}
        session.execute(
            insert(ReceiptFate)
            .values(release=event.release, **values)
            .on_conflict_do_update(
                index_elements=["release"], set_=values, where=ReceiptFate.head_version <= event.head_version
            )
        )


HANDLERS: dict[type[Event], Handler] = {
    FeedbackGiven: on_given,
    RewardUpdated: on_learned,
    SignalSetAside: on_set_aside,
    TrainingUsed: on_used,
    RunEnded: on_run_ended,
    DeploymentChanged: on_deployment,
}


def rebuild(session: Session) -> int:
    """Make the projection anew from the log, within the caller's transaction; return the number of events.

    What the log no longer holds (its retention) stays as it stands; each event only adds to it.
    """
    topics = sorted({event.topic for event in HANDLERS})
    first = session.scalar(sa.select(sa.func.min(OutboxRow.seq)))
    _lock_out_the_consumer(session)
    if first == 1:
        for table in (ReceiptUse, ReceiptRun, ReceiptFate):
            session.execute(sa.delete(table))
    pruned = sa.select(Feedback.id).where(Feedback.id == ReceiptRow.feedback_id).exists() & (
        ~sa.select(OutboxRow.seq).where(OutboxRow.event_id == ReceiptRow.feedback_id).exists()
    )
    session.execute(sa.delete(ReceiptRow).where(~pruned))
    num_events = 0
    for rows in _batches(session, topics):
        for row in rows:
            try:
                opened = list(reading.open_all(session, [reading.parse(row.value)], HANDLERS, public=True))
            except UnreadableEventError:
                continue  # what the consumer gave up adds nothing here either
            for envelope, event in opened:
                HANDLERS[envelope.event_class](session, [Delivery(event, envelope.event_id)])
        num_events += len(rows)
    return num_events


def _lock_out_the_consumer(session: Session) -> None:
    for table in (ReceiptRow, ReceiptUse, ReceiptRun, ReceiptFate):
        session.execute(sa.text(f"LOCK TABLE {table.__tablename__} IN SHARE ROW EXCLUSIVE MODE"))


def _batches(session: Session, topics: list[str]) -> Iterator[Sequence[Any]]:
    after = 0
    query = sa.select(OutboxRow.seq, OutboxRow.value).where(OutboxRow.topic.in_(topics)).order_by(OutboxRow.seq)
    while rows := session.execute(query.where(OutboxRow.seq > after).limit(REBUILD_ROWS)).all():
        yield rows
        after = rows[-1].seq
