"""``/v1/raters``, ``/v1/probes`` and exclusions: what operators judge and decide about what people said."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from deploy import decisions
from deploy.api import ByOperator, Reasoned
from infra.access.gate import needs
from infra.access.roles import Role
from infra.text import CleanText

router = APIRouter(prefix="/v1", tags=["rewards"], dependencies=[needs(Role.OPERATOR)])
Named = Annotated[CleanText, Path(max_length=200)]


class RulingRequest(Reasoned):
    """What is decided about a rater, and why."""

    rater: CleanText = Field(max_length=200, description="A user, or (as program:NAME) a verifier or judge.")
    ruling: Literal["banned", "cleared"] | None = Field(description="null: their record counts again.")


class QuarantineRequest(Reasoned):
    """What is decided about a burst of votes, and why."""

    verdict: Literal["release", "discard"]


class ProbeRequest(Reasoned):
    """What an operator says of an answer, and why."""

    episode_id: CleanText
    good: bool
    over: CleanText | None = Field(None, description="An answer that it is judged against.")


class Decided(BaseModel):
    """The id under which a decision is kept; the reward model follows within a second."""

    id: str


@router.post("/raters/rulings", status_code=202)
def rule(body: RulingRequest, who: ByOperator) -> Decided:
    """Take out all that a rater said, count them whatever their record says, or let the record count again."""
    return Decided(id=decisions.rule(who, body.rater, body.ruling, body.reason))


@router.post("/quarantines/{name}", status_code=202)
def decide_quarantine(name: Named, body: QuarantineRequest, who: ByOperator) -> Decided:
    """Let the votes of a burst count, or take them out for good."""
    return Decided(id=decisions.decide_quarantine(who, name, body.verdict, body.reason))


@router.post("/episodes/{episode_id}/exclude", status_code=202)
def exclude(episode_id: Named, body: Reasoned, who: ByOperator) -> None:
    """Have nothing learned from an answer any more, for good; what was learned is taken out within a second."""
    decisions.exclude(who, episode_id, body.reason)


@router.post("/probes", status_code=202)
def judge(body: ProbeRequest, who: ByOperator) -> Decided:
    """Judge an answer: raters are held against it."""
    return Decided(id=decisions.judge(who, body.episode_id, good=body.good, over=body.over, reason=body.reason))
