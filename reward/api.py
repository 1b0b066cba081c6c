"""``GET /v1/episodes/{id}``: an answer, what was said of it, and how good it is believed to be."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request
from pydantic import BaseModel

from feedback import episodes
from feedback.signals import standing_of
from feedback.tables import Feedback
from infra.db import transaction
from infra.text import CleanText
from reward.tables import RewardScore

router = APIRouter(prefix="/v1", tags=["episodes"])


class ScoreView(BaseModel):
    """The belief about an answer: logit mean and standard deviation, and P(good)."""

    mean: float
    sd: float
    p_good: float
    update_seq: int
    encoder: str


class SignalView(BaseModel):
    """A signal that stands."""

    id: str
    kind: str
    value: int | None
    text: str | None


class EpisodeView(BaseModel):
    """An episode as its API shows it."""

    id: str
    created_at: datetime
    release: str
    arm: str
    status: str
    messages: list[dict[str, Any]]
    answer: str
    latency_ms: float
    num_completion_tokens: int
    feedback: list[SignalView]
    score: ScoreView | None


@router.get("/episodes/{episode_id}")
def get_episode(episode_id: CleanText, request: Request) -> EpisodeView:
    """Return an episode with its standing signals and its score (null until the worker has seen it)."""
    with transaction(request.app.state.sessions) as session:
        episode = episodes.get(session, episode_id)
        rows = session.scalars(sa.select(Feedback).where(Feedback.episode_id == episode_id)).all()
        score = session.get(RewardScore, episode_id)
        return EpisodeView(
            id=episode.id,
            created_at=episode.created_at,
            release=episode.release,
            arm=episode.arm,
            status=episode.status,
            messages=episode.messages,
            answer=episode.answer,
            latency_ms=episode.latency_ms,
            num_completion_tokens=len(episode.token_ids),
            feedback=[
                SignalView(id=s.feedback_id, kind=s.kind, value=s.value, text=s.text) for s in standing_of(rows)
            ],
            score=score and ScoreView.model_validate(score, from_attributes=True),
        )
