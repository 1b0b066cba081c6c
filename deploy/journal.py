"""The log of a canary: who has met which arm, and how the users of each voted, in an order that never changes.

Users are what a canary randomises, so each is one trial and has one vote, however often they chat: the first
settled answer counts for what happened to it, the first thumb on an answer of their own for the arm of that
answer (intention to treat). It stays counted as it was given; a later change of mind teaches the reward model,
but would reorder what the e-processes have seen, and they are valid only on a sequence that does not change
behind them.

The order is that of the answers' beginnings, and an answer counts only when it has had time to end and to be voted
on: in the order of arrival short answers would come first, and a candidate whose good answers are short would look
better than it is. What comes later than that is put at the end, where it is when it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.orm import Session

from deploy.refusals import is_refusal
from deploy.rollout import Event, Plan
from deploy.tables import Canary, CanaryEvent, CanaryUser
from feedback.tables import Episode, Feedback, User
from reward.style import num_words
from reward.tables import RewardRater

FAILED, SLOW, UNUSUAL_LENGTH, REFUSED, UNRATED = "failed", "slow", "unusual_length", "refused", "unrated"
COMMIT_SLACK = timedelta(seconds=60)  # a row may be seen so long after the time that it bears

_began_at = Episode.created_at - sa.func.make_interval(
    0, 0, 0, 0, 0, 0, Episode.latency_ms / 1000.0, type_=sa.Interval
)


def read(session: Session, canary_id: int, after_seq: int = 0) -> list[Event]:
    """Return the events of a canary in their order, those after `after_seq`."""
    rows = session.scalars(
        sa.select(CanaryEvent)
        .where(CanaryEvent.canary_id == canary_id, CanaryEvent.seq > after_seq)
        .order_by(CanaryEvent.seq)
    )
    return [Event(r.at_s, r.kind, r.arm, frozenset(r.flags), r.good) for r in rows]  # type: ignore[arg-type]


def append(session: Session, canary_id: int, events: Sequence[Event]) -> None:
    """Add events; the caller holds the canary's row."""
    last = session.scalar(sa.select(sa.func.max(CanaryEvent.seq)).where(CanaryEvent.canary_id == canary_id)) or 0
    rows = [
        {
            "canary_id": canary_id,
            "seq": seq,
            "at_s": event.at_s,
            "kind": event.kind,
            "arm": event.arm,
            "flags": sorted(event.flags),
            "good": event.good,
        }
        for seq, event in enumerate(events, last + 1)
    ]
    if rows:
        session.execute(sa.insert(CanaryEvent), rows)


def collect(session: Session, canary: Canary, settle_s: float) -> list[Event]:
    """Add what has settled since the last look, and return it.

    Parameters
    ----------
    settle_s
        Answers that began less than this long ago are left to a later look.
    """
    now = session.scalar(sa.select(sa.func.now()))
    assert now is not None
    at_s = (now - canary.opened_at).total_seconds()
    settled = now - timedelta(seconds=settle_s)
    since = canary.looked_at - timedelta(seconds=settle_s) - COMMIT_SLACK
    votes = _new_votes(session, canary, since, settled)
    plan = Plan.model_validate(canary.plan)
    found: list[tuple[datetime, int, Event]] = []
    for row in _new_trials(session, canary, since, settled):
        found.append((row.began_at, 0, Event(at_s, "trial", row.arm, _flags(row, plan))))
    for row in votes:
        found.append((row.began_at, 1, Event(at_s, "vote", row.arm, good=row.value == 1)))
        _count(session, canary.id, row.user_id, voted=True)
    events = [event for *_, event in sorted(found, key=lambda entry: entry[:2])]
    append(session, canary.id, events)
    canary.looked_at = now
    return events


def _new_trials(session: Session, canary: Canary, since: datetime, settled: datetime) -> list[Any]:
    """Return the first settled answers of users who were not counted, and count them."""
    rated = sa.exists().where(
        Feedback.episode_id == Episode.id, Feedback.user_id == Episode.user_id, Feedback.kind == "thumb"
    )
    first = (
        _of(canary, since, settled)
        .add_columns(Episode.status, Episode.latency_ms, Episode.answer, rated.label("rated"))
        .outerjoin(CanaryUser, _counted(canary))
        .where(CanaryUser.user_id.is_(None))
        .ext(distinct_on(Episode.user_id))
        .order_by(Episode.user_id, _began_at)
    )
    rows = list(session.execute(first))
    for row in rows:
        _count(session, canary.id, row.user_id, voted=False)
    return rows


def _new_votes(session: Session, canary: Canary, since: datetime, settled: datetime) -> list[Any]:
    """Return the first thumbs of users who have not voted; raters whom nobody believes have no vote."""
    believed = sa.or_(RewardRater.name.is_(None), ~RewardRater.set_aside, RewardRater.ruling == "cleared")
    first = (
        _of(canary, canary.opened_at, settled)
        .add_columns(Feedback.value)
        .join(Feedback, sa.and_(Feedback.episode_id == Episode.id, Feedback.user_id == Episode.user_id))
        .outerjoin(RewardRater, RewardRater.name == User.key_id)
        .outerjoin(CanaryUser, _counted(canary))
        .where(
            Feedback.kind == "thumb",
            Feedback.value != 0,
            Feedback.created_at >= since,
            sa.func.coalesce(CanaryUser.voted, False).is_(False),
            believed,
        )
        .ext(distinct_on(Episode.user_id))
        .order_by(Episode.user_id, Feedback.seq)
    )
    return list(session.execute(first))


def _of(canary: Canary, since: datetime, settled: datetime) -> Any:
    return (
        sa.select(Episode.user_id, Episode.arm, _began_at.label("began_at"))
        .join(User, User.user_id == Episode.user_id)
        .where(
            Episode.canary_id == canary.id,
            Episode.arm.in_(("champion", "challenger")),
            Episode.learn,
            Episode.created_at >= since,
            _began_at < settled,
            User.forgotten_at.is_(None),  # it is not known any more whether they were counted
        )
    )


def _counted(canary: Canary) -> sa.ColumnElement[bool]:
    return sa.and_(CanaryUser.canary_id == canary.id, CanaryUser.user_id == Episode.user_id)


def _count(session: Session, canary_id: int, user_id: str, *, voted: bool) -> None:
    row = insert(CanaryUser).values(canary_id=canary_id, user_id=user_id, voted=voted)
    session.execute(
        row.on_conflict_do_update(index_elements=["canary_id", "user_id"], set_={"voted": True})
        if voted
        else row.on_conflict_do_nothing()
    )


def _flags(row: Any, plan: Plan) -> frozenset[str]:
    """Return which of the guardrails' events happened to a user's first answer."""
    happened = {
        FAILED: row.status == "failed",
        SLOW: plan.slow_ms is not None and row.latency_ms > plan.slow_ms,
        UNUSUAL_LENGTH: plan.words is not None and not plan.words[0] <= num_words(row.answer) <= plan.words[1],
        REFUSED: is_refusal(row.answer),
        UNRATED: not row.rated,
    }
    return frozenset(name for name, it_did in happened.items() if it_did)
