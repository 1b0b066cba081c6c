"""Going on with an answer that stopped before its end: for somebody's yes, or because something broke.

Calls that have ended are never made again. What goes on is another episode, which names the one before; together
they are one turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy.orm import Session

from agent.schema import ChatRequest
from agent.turn import Waited
from feedback import episodes, tool_calls
from feedback.steps import last_calls, with_calls
from feedback.tables import Episode
from infra.db import Sessions, transaction
from infra.errors import ConflictError, NotFoundError
from infra.settings import ASSISTANT_MODEL


@dataclass(frozen=True, slots=True)
class Stopped:
    """An episode to be gone on from, and whether calls of it wait for a yes; else they have ended."""

    episode: Episode
    waits: bool


def find(sessions: Sessions, episode_id: str, user: str) -> Stopped:
    """Return what is gone on from: the episode, or (where it went on and that broke off) the last one of the turn.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``, also where it has no calls.
    ConflictError
        Code ``already_continued``.
    """
    with transaction(sessions) as session:
        named = episodes.get(session, episode_id, user)
        last = _last(session, named)
        session.expunge(last)
    statuses = {call["status"] for call in last_calls(last.steps)}
    if last is named and "pending" in statuses:
        return Stopped(last, waits=True)
    if last.status != "complete" and statuses and not statuses & {"pending", "handed_over"}:
        return Stopped(last, waits=False)
    if last is not named:
        raise ConflictError(
            f"It went on already, as {last.id}. A call is made once.", code="already_continued", param="episode_id"
        )
    raise NotFoundError(
        f"No call of {episode_id!r} waits for you, and it did not break off after one.",
        code="episode_not_found",
        param="episode_id",
    )


def _last(session: Session, episode: Episode) -> Episode:
    while True:
        later = sa.select(Episode).where(Episode.continues == episode.id, Episode.user_id == episode.user_id)
        found = session.scalar(later.order_by(Episode.id.desc()).limit(1))
        if found is None:
            return episode
        episode = found


def waited(sessions: Sessions, stopped: Stopped) -> Waited:
    """Return what a turn goes on from."""
    episode = stopped.episode

    async def claim(continued_by: str) -> dict[str, bool]:
        def take() -> dict[str, bool]:
            with transaction(sessions) as session:
                return tool_calls.claim(session, episode.id, episode.user_id, continued_by)

        return await anyio.to_thread.run_sync(take)

    take = claim if stopped.waits else None
    return Waited(episode.id, episode.messages, episode.steps, take, episode.learn)


def request_of(episode: Episode, tools: Collection[str], how: Mapping[str, Any]) -> ChatRequest:
    """Return the request that an episode answered, as far as it still matters.

    Parameters
    ----------
    tools
        The server's tools that there are now; an MCP server may be gone since.
    how
        What differs: fields of a chat's request.
    """
    noted = episode.request or {}
    sampling = {name: value for name, value in episode.sampling.items() if name in ChatRequest.model_fields}
    question = {"role": "user", "content": "-"}  # what the model sees is the episode's own prompt
    request = ChatRequest.model_validate(
        {
            **sampling,
            "model": episode.release if episode.arm == "pinned" else ASSISTANT_MODEL,
            "messages": [question],
            "user": episode.user_id,
            "store": not noted.get("unstored", False),
            "parallel_tool_calls": not noted.get("one_call", False),
            "conversation": episode.conversation_id,
            "server_tools": [name for name in with_calls(episode.steps)[-1]["offered"] if name in tools],
            "response_format": noted.get("response_format"),
            "metadata": noted.get("metadata"),
            **how,
        }
    )
    return request.note(noted, parent=episode.parent_id)
