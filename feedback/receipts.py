"""Receipts: what became of a signal, for the person who gave it.

A projection of the log. Each event adds its part, whatever the order in which the topics arrive, so the tables can
be rebuilt from the log with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, Field
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.fold import as_standing, fold
from feedback.tables import Feedback, ReceiptFate, ReceiptRow, ReceiptRun, ReceiptUse
from infra.errors import NotFoundError
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
from infra.tables import OutboxRow

CONSUMER = "receipts"
MAX_PAGE = 100
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


class RewardPart(BaseModel):
    """What the reward model did with the signal."""

    update_seq: int = Field(description="The update of the posterior that used it.")
    p_before: float | None = Field(description="P(good) of the answer before.")
    p_after: float | None = Field(description="P(good) of the answer after.")


class TrainingPart(BaseModel):
    """A run whose dataset holds the signal, and what came of it."""

    run_id: str
    role: str = Field(description="train, or gates: kept to judge with.")
    dataset_digest: str
    reward_snapshot_id: int
    status: str | None = Field(description="How the run ended; null while it runs.")
    release: str | None
    adapter_digest: str | None
    fate: str | None = Field(description="canary, promoted, not_promoted, rolled_back, quarantined or held.")
    reason: str | None


class Receipt(BaseModel):
    """What became of a signal."""

    id: str
    episode_id: str
    kind: str
    given_at: datetime
    status: str = Field(description="accepted, learned, set_aside, superseded or withdrawn.")
    reason: str | None = Field(description="Why it was set aside, or by which signal it was superseded.")
    reward: RewardPart | None
    training: list[TrainingPart]
    summary: str = Field(description="The same in a sentence.")


# -- the projection -------------------------------------------------------------------------------


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
    "CAST(:feedback_ids AS text[]), CAST(:episode_ids AS text[])) ON CONFLICT DO NOTHING"
)


def on_learned(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Note what the reward model learned from."""
    newest = {d.event.feedback_id: d.event for d in deliveries if d.event.feedback_id is not None}
    _merge(
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
    _merge(
        session,
        [
            {"feedback_id": e.feedback_id, "episode_id": e.episode_id, "status": "set_aside", "reason": e.reason}
            for e in newest.values()
        ],
    )


def _merge(session: Session, rows: list[dict[str, Any]]) -> None:
    """Write receipts, one statement for all of them; what another event wrote gives way."""
    if rows:
        session.execute(_MERGE, {name: [row.get(name) for row in rows] for name in _TYPES})


_TYPES = {
    "feedback_id": "text",
    "episode_id": "text",
    "status": "text",
    "reason": "text",
    "update_seq": "bigint",
    "p_before": "float8",
    "p_after": "float8",
}
_MERGE = sa.text(
    f"INSERT INTO receipts ({', '.join(_TYPES)}) "
    f"SELECT * FROM unnest({', '.join(f'CAST(:{name} AS {kind}[])' for name, kind in _TYPES.items())}) "
    f"ON CONFLICT (feedback_id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _TYPES if name != "feedback_id")
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
        envelopes = [reading.parse(row.value) for row in rows]
        for envelope, event in reading.open_all(session, envelopes, HANDLERS, public=True):
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


# -- reading it -----------------------------------------------------------------------------------


def get(session: Session, feedback_id: str, user_id: str) -> Receipt:
    """Return the receipt of a signal.

    Raises
    ------
    NotFoundError
        Code ``feedback_not_found``, for somebody else's signal too.
    """
    row = session.scalars(sa.select(Feedback).where(Feedback.id == feedback_id)).one_or_none()
    if row is None or row.user_id != user_id:
        raise NotFoundError(
            f"There is no signal {feedback_id!r}. Use the `id` that POST /v1/feedback returned.",
            code="feedback_not_found",
            param="feedback_id",
        )
    return _receipts(session, [row])[0]


def page(session: Session, user_id: str, before: str | None, limit: int) -> list[Receipt]:
    """Return a user's receipts, the newest first.

    Parameters
    ----------
    before
        The id of the last receipt of the page before.
    """
    query = sa.select(Feedback).where(Feedback.user_id == user_id)
    if before is not None:
        query = query.where(Feedback.id < before)
    rows = session.scalars(query.order_by(Feedback.id.desc()).limit(min(limit, MAX_PAGE))).all()
    return _receipts(session, rows)


def _receipts(session: Session, rows: Sequence[Feedback]) -> list[Receipt]:
    ids = [row.id for row in rows]
    projected = {
        r.feedback_id: r for r in session.scalars(sa.select(ReceiptRow).where(ReceiptRow.feedback_id.in_(ids)))
    }
    training: dict[str, list[TrainingPart]] = {feedback_id: [] for feedback_id in ids}
    for use, run, fate in session.execute(
        sa.select(ReceiptUse, ReceiptRun, ReceiptFate)
        .outerjoin(ReceiptRun, ReceiptRun.run_id == ReceiptUse.run_id)
        .outerjoin(ReceiptFate, ReceiptFate.release == ReceiptRun.release)
        .where(ReceiptUse.feedback_id.in_(ids))
        .order_by(ReceiptUse.run_id)
    ):
        training[use.feedback_id].append(_training_part(use, run, fate))
    return [_receipt(session, row, projected.get(row.id), training[row.id]) for row in rows]


def _training_part(use: ReceiptUse, run: ReceiptRun | None, fate: ReceiptFate | None) -> TrainingPart:
    return TrainingPart(
        run_id=use.run_id,
        role=use.role,
        dataset_digest=use.dataset_digest,
        reward_snapshot_id=use.reward_snapshot_id,
        status=run and run.status,
        release=run and run.release,
        adapter_digest=run and run.adapter_digest,
        fate=fate.fate if fate else "held" if run and run.status == "held" else None,
        reason=fate.reason if fate else run and run.reason,
    )


def _receipt(
    session: Session, row: Feedback, projected: ReceiptRow | None, training: list[TrainingPart]
) -> Receipt:
    status = projected.status if projected else "accepted"
    reason = projected.reason if projected else None
    reward = None
    if projected is not None and projected.update_seq is not None:
        reward = RewardPart(update_seq=projected.update_seq, p_before=projected.p_before, p_after=projected.p_after)
    later = session.scalars(
        sa.select(Feedback).where(
            Feedback.slot == row.slot,
            Feedback.user_id == row.user_id,
            Feedback.kind == row.kind,
            Feedback.seq >= row.seq,
        )
    ).all()
    newest = max(later, key=lambda signal: signal.seq)
    if newest.id != row.id:
        status, reason = "superseded", newest.id
    elif not fold([as_standing(row)]):
        status, reason = "withdrawn", None
    receipt = Receipt(
        id=row.id,
        episode_id=row.episode_id,
        kind=row.kind,
        given_at=row.given_at or row.created_at,
        status=status,
        reason=reason,
        reward=reward,
        training=training,
        summary="",
    )
    receipt.summary = _sentence(receipt)
    return receipt


def _sentence(receipt: Receipt) -> str:
    """Say a receipt in a sentence."""
    said = "What you did" if receipt.kind == "implicit" else f"Your {receipt.kind}"
    if receipt.status == "superseded":
        return f"{said} was replaced by a later one ({receipt.reason})."
    if receipt.status == "withdrawn":
        return f"{said} withdraws what you said before."
    if receipt.status == "set_aside":
        said += f" was set aside ({receipt.reason})"
    elif receipt.reward is None or receipt.reward.p_after is None:
        said += " was accepted"
    else:
        before = f"from {receipt.reward.p_before:.0%} " if receipt.reward.p_before is not None else ""
        said += f" moved the belief that the answer is good {before}to {receipt.reward.p_after:.0%}"
    trained = [part for part in receipt.training if part.release]
    if not trained:
        return f"{said}; no adapter has been trained with it yet."
    last = next((part for part in reversed(trained) if part.fate == "promoted"), trained[-1])
    act = "helped to train" if last.role == "train" else "helped to judge"
    fate = (last.fate or "registered").replace("_", " ")
    return f"{said}, and {act} {last.release} ({fate})."
