"""Thumbs that move the weights of importance: a consumer of feedback, which applies each event once."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from agent.memory import learning
from feedback.tables import Episode
from infra.db import among
from infra.events import Event, FeedbackGiven
from infra.log.consumer import Delivery, Handler

CONSUMER = "memory"


def on_given(session: Session, deliveries: Sequence[Delivery]) -> None:
    """Take thumbs of those who asked into account, on answers that may be learned from."""
    thumbs = [delivery.event for delivery in deliveries if delivery.event.kind == "thumb" and delivery.event.value]
    ids = {event.episode_id for event in thumbs}
    rows = session.execute(
        sa.select(Episode.id, Episode.context).where(among(Episode.id, ids), Episode.learn, ~Episode.excluded)
    )
    records = {row.id: row.context for row in rows}
    for event in thumbs:
        if event.episode_id in records:
            learning.learn(session, event.episode_id, records[event.episode_id], event.value)


HANDLERS: dict[type[Event], Handler] = {FeedbackGiven: on_given}
