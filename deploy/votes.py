"""The votes of a canary: standing thumbs, by the arm that gave the answer, in the order in which they came."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy.canary import Evidence, decide
from deploy.tables import Canary
from feedback.signals import standing_of
from feedback.tables import Episode, Feedback


def votes(session: Session, canary_id: int) -> tuple[list[bool], list[bool]]:
    """Return the standing votes of the champion's arm and of the challenger's (True for good)."""
    rows = session.execute(
        sa.select(Feedback, Episode.arm)
        .join(Episode, Episode.id == Feedback.episode_id)
        .where(Episode.canary_id == canary_id, Feedback.kind == "thumb")
    ).all()
    arms = {feedback.episode_id: arm for feedback, arm in rows}
    standing = standing_of(feedback for feedback, _ in rows)
    champion = [s.value == 1 for s in standing if arms[s.episode_id] == "champion"]
    challenger = [s.value == 1 for s in standing if arms[s.episode_id] == "challenger"]
    return champion, challenger


def weigh(session: Session, canary: Canary) -> Evidence:
    """Return the evidence on a canary as it stands."""
    return decide(*votes(session, canary.id), canary.alpha)
