"""Recording episodes: one transaction writes the answer and its event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session, aliased

from feedback import tool_calls, users
from feedback.steps import continued
from feedback.tables import Conversation, Episode, SelfEvaluation
from infra.db import among
from infra.errors import NotFoundError
from infra.events import EpisodeRecorded, SelfEvaluated
from infra.ids import new_id
from infra.log import outbox
from infra.log.outbox import Entry
from infra.sealing import SubjectKey
from infra.telemetry import tracing

MAX_PAGE = 100


def new_episode_id(at: datetime | None = None) -> str:
    """Return a fresh episode id; it is also the ``id`` of the API's response."""
    return new_id("ep", at)


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
    conversation_id: str | None = None
    parent_id: str | None = None
    context: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    request: dict[str, Any] | None = None
    traceparent: str | None = field(default_factory=tracing.traceparent)


COLUMNS = tuple(name for name in Recording.__slots__ if name not in ("episode_id", "traceparent"))


def begin(session: Session, user_id: str, learn_by_default: bool) -> tuple[SubjectKey, bool]:
    """Meet a user at the start of a turn: return their key, and whether they may be learned from."""
    return users.meet(session, user_id), users.may_learn(session, user_id, learn_by_default)


def record(session: Session, recording: Recording, key: SubjectKey, created_at: datetime | None = None) -> bool:
    """Write the episode and its event within the caller's transaction.

    Parameters
    ----------
    key
        The user's key when the turn began.

    Returns
    -------
    bool
        False where the user was forgotten in the meantime: then nothing is written.
    """
    now = users.key_of(session, recording.user_id)
    if now is None or now.key_id != key.key_id:
        return False
    record_many(session, [(recording, created_at)], {recording.user_id: key})
    return True


def record_many(
    session: Session, recordings: Iterable[tuple[Recording, datetime | None]], keys: Mapping[str, SubjectKey]
) -> None:
    """Write episodes and their events within the caller's transaction, in a few statements.

    Parameters
    ----------
    recordings
        Each with the time at which it was made; now, where that is None.
    keys
        The key of each user, from :func:`feedback.users.keys_of` within the same transaction.
    """
    rows, entries, written = [], [], []
    for recording, created_at in _in_conversations(session, list(recordings)):
        written.append(recording)
        row = {name: getattr(recording, name) for name in COLUMNS}
        row |= {"id": recording.episode_id, "continues": continued(recording.steps)}
        if created_at is not None:
            row["created_at"] = created_at
        rows.append(row)
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
            conversation_id=recording.conversation_id,
            parent_id=recording.parent_id,
            steps=recording.steps,
        ).happened_in(recording.traceparent)
        entries.append(Entry(event, recording.episode_id, recording.episode_id, keys[recording.user_id]))
    if rows:
        session.execute(sa.insert(Episode), rows)
        tool_calls.keep(session, written)
        outbox.append_many(session, entries)


def _in_conversations(
    session: Session, recordings: list[tuple[Recording, datetime | None]]
) -> list[tuple[Recording, datetime | None]]:
    """Note that conversations were used; a turn whose conversation was deleted meanwhile loses its words, too."""
    named = {r.conversation_id for r, _ in recordings if r.conversation_id is not None}
    if not named:
        return recordings
    # In the order of ids, so that two who wait for each other's rows cannot be.
    locked = sa.select(Conversation.id).where(among(Conversation.id, named)).order_by(Conversation.id)
    kept = set(session.scalars(locked.with_for_update(key_share=True)))
    session.execute(
        sa.update(Conversation)
        .where(among(Conversation.id, kept))
        .values(updated_at=sa.func.now())
        .execution_options(synchronize_session=False)
    )
    return [
        (recording if recording.conversation_id in {None, *kept} else _without_words(recording), created_at)
        for recording, created_at in recordings
    ]


def _without_words(recording: Recording) -> Recording:
    blank: dict[str, Any] = {"messages": [], "answer": "", "token_ids": [], "logprobs": [], "learn": False}
    return replace(recording, **blank, context=None, steps=[], request=None, conversation_id=None, parent_id=None)


def blanked() -> dict[str, Any]:
    """Return the values of an episode's row that take out what was said in it, and out of which conversation."""
    return {
        "messages": sa.literal([], JSONB),
        "answer": "",
        "token_ids": [],
        "logprobs": [],
        "context": None,
        "steps": sa.literal([], JSONB),
        "request": None,
        "conversation_id": None,
        "parent_id": None,
        "continues": None,
    }


def is_shown() -> sa.ColumnElement[bool]:
    """Return the condition that an episode stands for its turn.

    An answer that waited, or broke off, and went on as another is one turn with it. But where something else
    follows it, it is a place that one comes from, and stays.
    """
    later, child = aliased(Episode), aliased(Episode)
    went_on = sa.exists().where(later.continues == Episode.id, later.user_id == Episode.user_id)
    is_followed = sa.exists().where(child.conversation_id == Episode.conversation_id, child.parent_id == Episode.id)
    return sa.or_(~went_on, is_followed)


def same_turn(session: Session, episode_id: str) -> list[str]:
    """Return the ids of all answers that are one turn with this one, of its user: what came before it and after."""
    own = Episode.user_id == sa.select(Episode.user_id).where(Episode.id == episode_id).scalar_subquery()
    found = {episode_id}
    asked: set[str] = set()
    while latest := found - asked:
        asked |= latest
        near = sa.or_(
            among(Episode.continues, latest),
            Episode.id.in_(sa.select(Episode.continues).where(among(Episode.id, latest))),
        )
        found |= set(session.scalars(sa.select(Episode.id).where(own, near)))
    return sorted(found)


def record_self_evaluation(session: Session, recording: Recording, p_good: float) -> bool:
    """Write what a release thinks of its own answer, and its event, within the caller's transaction.

    Returns
    -------
    bool
        False where it was written before, or the user was forgotten in the meantime: then nothing is written.
    """
    users.key_of(session, recording.user_id)  # so that the user is not forgotten before this commits
    own = sa.select(Episode.id).where(Episode.id == recording.episode_id, Episode.user_id == recording.user_id)
    values = {"episode_id": recording.episode_id, "release": recording.release, "p_good": p_good}
    if session.scalar(own) is None or not session.scalar(
        insert(SelfEvaluation).values(values).on_conflict_do_nothing().returning(SelfEvaluation.episode_id)
    ):
        return False
    event = SelfEvaluated.model_validate(values).happened_in(recording.traceparent)
    outbox.append(session, event, key=recording.episode_id)
    return True


def get(session: Session, episode_id: str, user_id: str | None = None) -> Episode:
    """Return an episode.

    Parameters
    ----------
    user_id
        Whose it must be; somebody else's is not there for them.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    """
    episode = session.get(Episode, episode_id)
    if episode is None or (user_id is not None and episode.user_id != user_id):
        raise not_found(episode_id)
    return episode


def not_found(episode_id: str, param: str = "episode_id") -> NotFoundError:
    """Return the error for an episode that is not there, or not there for the one who asks."""
    return NotFoundError(
        f"There is no episode {episode_id!r}. Use the `id` of a chat completion.",
        code="episode_not_found",
        param=param,
    )


def page(session: Session, user_id: str, before: str | None, limit: int) -> Sequence[Episode]:
    """Return a user's episodes, the newest first.

    Parameters
    ----------
    before
        The id of the last episode of the page before.
    """
    query = sa.select(Episode).where(Episode.user_id == user_id)
    if before is not None:
        query = query.where(Episode.id < before)
    return session.scalars(query.order_by(Episode.id.desc()).limit(min(limit, MAX_PAGE))).all()
