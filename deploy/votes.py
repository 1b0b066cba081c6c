"""The votes of a canary: one per user, by the user's arm, in the order in which their answers began.

Users are what the canary randomises, so a user is one trial, however often they chat: the first thumb of each
user on an answer of their own counts. It stays counted as it was given; a later change of mind teaches the reward
model, but would reorder the pairs, and the e-process is only valid on a sequence that does not change behind it.

The order is that of the answers' beginnings, and an answer counts only when it has had time to end and to be voted
on: in the order of arrival, short answers would come first, and a candidate whose good answers are short would look
better than it is.
"""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy.canary import Evidence, decide
from deploy.tables import Canary
from feedback.tables import Episode, Feedback


def votes(session: Session, canary_id: int, settle_s: float) -> tuple[list[bool], list[bool]]:
    """Return the votes of the champion's users and of the challenger's (True for good).

    Parameters
    ----------
    settle_s
        Answers that began less than this long ago are left out.
    """
    began_at = Episode.created_at - _seconds(Episode.latency_ms / 1000.0)
    rows = session.execute(
        sa.select(Episode.arm, Episode.user_id, Feedback.value)
        .join(Feedback, sa.and_(Feedback.episode_id == Episode.id, Feedback.user_id == Episode.user_id))
        .where(
            Episode.canary_id == canary_id,
            Episode.learn,
            Feedback.kind == "thumb",
            Feedback.value != 0,
            began_at < sa.func.now() - _seconds(sa.literal(settle_s)),
        )
        .order_by(began_at, Feedback.seq)
    )
    first: dict[str, tuple[str, bool]] = {}
    for arm, user_id, value in rows:
        first.setdefault(user_id, (arm, value == 1))
    champion = [good for arm, good in first.values() if arm == "champion"]
    challenger = [good for arm, good in first.values() if arm == "challenger"]
    return champion, challenger


def _seconds(value: sa.ColumnElement[float]) -> sa.ColumnElement[timedelta]:
    return sa.func.make_interval(0, 0, 0, 0, 0, 0, value, type_=sa.Interval)


def weigh(session: Session, canary: Canary, settle_s: float) -> Evidence:
    """Return the evidence on a canary as it stands."""
    return decide(*votes(session, canary.id, settle_s), canary.alpha)
