"""Recording episodes: one transaction writes the answer and its event."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from feedback.tables import Episode
from infra import outbox
from infra.errors import NotFoundError
from infra.events import EpisodeRecorded


def new_episode_id() -> str:
    """Return a fresh episode id; it is also the ``id`` of the API's response."""
    return f"ep_{uuid.uuid4().hex}"


@dataclass(slots=True)
class Recording:
    """An answer while it grows."""

    episode_id: str
    user_id: str
    release: str
    adapter_digest: str | None
    canary_id: int | None
    arm: str
    propensity: float
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    learn: bool
    answer: str = ""
    status: str = "interrupted"
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    ttft_ms: float | None = None
    latency_ms: float = 0.0


def record(session: Session, recording: Recording) -> None:
    """Write the episode and its event within the caller's transaction."""
    values = {name: getattr(recording, name) for name in Recording.__slots__ if name != "episode_id"}
    session.add(Episode(id=recording.episode_id, **values))
    event = EpisodeRecorded(
        episode_id=recording.episode_id,
        user_id=recording.user_id,
        release=recording.release,
        arm=recording.arm,
        propensity=recording.propensity,
        status=recording.status,
        learn=recording.learn,
        messages=recording.messages,
        answer=recording.answer,
    )
    outbox.append(session, event, key=recording.episode_id)


def get(session: Session, episode_id: str) -> Episode:
    """Return an episode.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    """
    episode = session.get(Episode, episode_id)
    if episode is None:
        raise NotFoundError(
            f"There is no episode {episode_id!r}. Use the `id` of a chat completion.",
            code="episode_not_found",
            param="episode_id",
        )
    return episode
