"""What people say of answers, for memory: thumbs move the weights, corrected answers are found by their new words.

A consumer of feedback. An event only says where to look; what is done follows from what stands in the log by then,
so the same event again, or one that comes late, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from agent.memory import learning, sentences, terms
from feedback import erasure
from infra.events import AnswerExcluded, Event, FeedbackGiven, UserForgotten
from infra.log.consumer import Delivery, Handler

CONSUMER = "memory"
# The last thumb of the one whose answer it is, 0 for none; and 0 where nothing may be learned of the answer, or its
# words are gone.
STANDING = sa.text("""
    SELECT id, context, CASE WHEN learn AND NOT excluded AND messages <> '[]' THEN coalesce((
        SELECT value FROM feedback
        WHERE feedback.episode_id = episodes.id AND feedback.user_id = episodes.user_id
            AND feedback.kind = 'thumb' AND feedback.slot = episodes.id
        ORDER BY feedback.seq DESC LIMIT 1), 0) ELSE 0 END AS value
    FROM episodes WHERE id = ANY(CAST(:ids AS varchar[])) ORDER BY id
""")


def on_given(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Take into account what was said."""
    events = [delivery.event for delivery in deliveries]
    corrected = {event.episode_id for event in events if event.kind == "correction"}
    if corrected:
        terms.index_again(session, corrected)
        sentences.forget(session, corrected)
    _learn(session, {event.episode_id for event in events if event.kind == "thumb"})


def on_excluded(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Take back what was learned of answers that nothing may be learned of any more."""
    _learn(session, {delivery.event.episode_id for delivery in deliveries})


def on_forgotten(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Take back what was learned of people who were forgotten."""
    for delivery in deliveries:
        episode_ids, _ = erasure.concerned(session, delivery.event.tombstone)
        _learn(session, episode_ids)


def _learn(session: Session, episode_ids: Collection[str]) -> None:
    if episode_ids:
        learning.lock(session)
        for row in session.execute(STANDING, {"ids": sorted(episode_ids)}).all():
            learning.learn(session, row.id, row.context, row.value)


HANDLERS: dict[type[Event], Handler] = {
    FeedbackGiven: on_given,
    AnswerExcluded: on_excluded,
    UserForgotten: on_forgotten,
}
