"""What is asked of the reward worker's sentence model, and what it answers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from infra.text import CleanText

MAX_TEXTS = 8  # so that nobody waits long for somebody else's
MAX_TEXT_CHARS = 4_000  # about four of the model's windows


class EmbedRequest(BaseModel):
    """Texts to embed; what somebody waits for goes first."""

    model_config = ConfigDict(extra="forbid")

    texts: list[CleanText] = Field(min_length=1, max_length=MAX_TEXTS)
    is_awaited: bool = False


class Embedded(BaseModel):
    """Vectors of length 1, one for each text, and the name of the model that made them."""

    encoder: str
    vectors: list[list[float]]
