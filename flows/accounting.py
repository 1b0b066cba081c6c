"""Did anything get lost? The client's list against the database and against what consumers applied."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.tables import Episode, Feedback
from flows.population import Acknowledged
from infra.events import EpisodeRecorded, FeedbackGiven
from infra.tables import ConsumedEvent, OutboxRow
from reward import CONSUMER


def backlog(session: Session) -> int:
    """Return how many episode and feedback events the reward worker has not applied yet."""
    return int(
        session.scalar(
            sa.select(sa.func.count())
            .select_from(OutboxRow)
            .outerjoin(
                ConsumedEvent,
                sa.and_(ConsumedEvent.event_id == OutboxRow.event_id, ConsumedEvent.consumer == CONSUMER),
            )
            .where(
                OutboxRow.topic.in_([EpisodeRecorded.topic, FeedbackGiven.topic]),
                ConsumedEvent.event_id.is_(None),
            )
        )
        or 0
    )


def lost_events(session: Session, acknowledged: Acknowledged) -> int:
    """Count acknowledged episodes and signals that the database or the reward worker does not have."""
    return (
        _missing(session, acknowledged.episodes, sa.select(Episode.id))
        + _missing(session, acknowledged.feedback, sa.select(Feedback.id))
        + _missing(session, [*acknowledged.episodes, *acknowledged.feedback], _applied())
    )


def _applied() -> sa.Select[str]:
    """Return the events that were applied; those of episodes and signals bear their ids."""
    return sa.select(ConsumedEvent.event_id).where(ConsumedEvent.consumer == CONSUMER, ~ConsumedEvent.dead_letter)


def _missing(session: Session, ids: Sequence[str], present: sa.Select[str]) -> int:
    return len(set(ids) - set(session.scalars(present)))
