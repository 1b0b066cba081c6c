"""``GET /v1/episodes`` and ``POST /v1/rewards/score``: answers, and how good they are believed to be."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from feedback import episodes
from feedback.api import Before, Limit
from feedback.fold import fold, histories
from feedback.identity import CurrentUser
from feedback.tables import Episode, Feedback, SelfEvaluation
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText
from reward import client
from reward.scored import ScoreBatch, ScoreRequest
from reward.tables import RewardScore, Solicitation

router = APIRouter(prefix="/v1", tags=["episodes"], dependencies=[needs(Role.USER)])
Row = TypeVar("Row", RewardScore, SelfEvaluation, Solicitation)


class ScoreView(BaseModel):
    """The belief about an answer: logit mean and standard deviation, and P(good)."""

    mean: float
    sd: float
    p_good: float
    abstain: bool
    update_seq: int
    encoder: str


class SolicitationView(BaseModel):
    """Why a rating of an answer is asked for, and how probable that was."""

    reason: Literal["random", "informative"]
    form: Literal["rating", "pair"] = Field(description="A rating, or a choice between it and another answer.")
    propensity: float


class SignalView(BaseModel):
    """A signal that stands."""

    id: str = Field(validation_alias="feedback_id")
    kind: str
    value: int | None
    score: float | None
    name: str | None
    reasons: tuple[str, ...] | None
    over: str | None
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
    steps: list[dict[str, Any]] = Field(description="Calls of tools before the answer, with what came of them.")
    latency_ms: float
    num_completion_tokens: int
    feedback: list[SignalView]
    score: ScoreView | None
    self_evaluation: float | None = Field(
        description="How probable the release that answered finds it that the answer is good; null until asked."
    )
    context: dict[str, Any] | None = Field(
        description="How `messages` was made of what was said before: budget, what was kept and why; else null."
    )
    solicited: SolicitationView | None = Field(description="Whether a rating is asked for; null if not.")


class EpisodePage(BaseModel):
    """Episodes, the newest first; ``next_before`` is null on the last page."""

    data: list[EpisodeView]
    next_before: str | None


@router.get("/episodes/{episode_id}")
def get_episode(episode_id: CleanText, user: CurrentUser, request: Request) -> EpisodeView:
    """Return an episode of yours with its standing signals and its score (null until the worker has seen it)."""
    with transaction(request.app.state.sessions) as session:
        return _views(session, [episodes.get(session, episode_id, user)])[0]


@router.get("/episodes")
def list_episodes(user: CurrentUser, request: Request, before: Before = None, limit: Limit = 20) -> EpisodePage:
    """List your episodes, the newest first."""
    with transaction(request.app.state.sessions) as session:
        found = _views(session, episodes.page(session, user, before, limit))
    return EpisodePage(data=found, next_before=found[-1].id if len(found) == limit else None)


@router.post("/rewards/score", tags=["rewards"], dependencies=[needs(Role.RATER)])
async def score(body: ScoreRequest, request: Request) -> ScoreBatch:
    """Score answers that need not be recorded: the belief, the pessimistic reward, and what contributed to it."""
    return await client.score(request.app.state.reward, body)


def _views(session: Session, found: Sequence[Episode]) -> list[EpisodeView]:
    ids = [episode.id for episode in found]
    scores = _by_episode(session, RewardScore, ids)
    evaluations = _by_episode(session, SelfEvaluation, ids)
    solicitations = _by_episode(session, Solicitation, ids)
    signals: dict[str, list[SignalView]] = {episode_id: [] for episode_id in ids}
    slots = session.scalars(sa.select(Feedback.slot).where(Feedback.episode_id.in_(ids)))
    for s in fold(signal for history in histories(session, slots).values() for signal in history):
        if s.episode_id in signals:
            signals[s.episode_id].append(SignalView.model_validate(s, from_attributes=True))
    return [
        EpisodeView(
            id=episode.id,
            created_at=episode.created_at,
            release=episode.release,
            arm=episode.arm,
            status=episode.status,
            messages=episode.messages,
            answer=episode.answer,
            steps=episode.steps,
            context=episode.context,
            latency_ms=episode.latency_ms,
            num_completion_tokens=len(episode.token_ids),
            feedback=signals[episode.id],
            score=ScoreView.model_validate(scores[episode.id], from_attributes=True)
            if episode.id in scores
            else None,
            self_evaluation=evaluations[episode.id].p_good if episode.id in evaluations else None,
            solicited=SolicitationView.model_validate(solicitations[episode.id], from_attributes=True)
            if episode.id in solicitations
            else None,
        )
        for episode in found
    ]


def _by_episode(session: Session, table: type[Row], ids: Sequence[str]) -> dict[str, Row]:
    rows = session.scalars(sa.select(table).where(table.episode_id.in_(ids)))
    return {row.episode_id: row for row in rows}
