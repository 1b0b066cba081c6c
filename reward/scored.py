"""What is asked of the reward worker, and what it answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from infra.text import CleanText

MAX_SCORED = 64
MAX_SCORED_MESSAGES = 200


class ScoredMessage(BaseModel):
    """A message of the conversation before the answer."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: CleanText


class ScoreItem(BaseModel):
    """An answer to be scored; with a reference, against that answer to the same messages."""

    model_config = ConfigDict(extra="forbid")

    messages: list[ScoredMessage] = Field(min_length=1, max_length=MAX_SCORED_MESSAGES)
    answer: CleanText = Field(description="What the assistant said.")
    reference: CleanText | None = Field(None, description="What it is compared with.")


class ScoreRequest(BaseModel):
    """A batch of answers."""

    model_config = ConfigDict(extra="forbid")

    items: list[ScoreItem] = Field(min_length=1, max_length=MAX_SCORED)
    snapshot_id: int | None = Field(
        None, ge=1, lt=2**31, description="A pinned snapshot; the newest state if unset."
    )


class ScoredItem(BaseModel):
    """The belief about one answer (or, with a reference, about the difference)."""

    mean: float = Field(description="Mean of the logit.")
    sd: float = Field(description="Its standard deviation.")
    p_good: float = Field(description="Calibrated probability that it is good (or better).")
    abstain: bool = Field(description="Whether too little is known of such answers to say anything.")
    reward: float = Field(description="Mean minus kappa standard deviations, clipped: what training sees.")
    contributions: dict[str, float] = Field(description="What content, prompt, style and constant add to the mean.")


class ScoreBatch(BaseModel):
    """Scores in the order of the items, and the version that gave them."""

    encoder: str
    update_seq: int
    snapshot_id: int | None
    kappa: float
    data: list[ScoredItem]
