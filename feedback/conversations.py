"""Conversations that people keep: listed, found again, renamed, deleted. Their turns are episodes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from feedback import episodes, users
from feedback.acceptance import accept_many
from feedback.fold import Standing, fold, histories
from feedback.signals import Withdrawal
from feedback.tables import QUESTION, WORDS, Conversation, Episode, Feedback, ToolCall, User
from infra.db import among
from infra.errors import EverloopError, InvalidRequestError, NotFoundError
from infra.events import AnswerExcluded
from infra.ids import new_id
from infra.log import outbox
from infra.log.outbox import Entry

MAX_TITLE_CHARS = 80
LOOKED_AT_CHARS = 400  # of a question, for a title
_WORD = re.compile(r"\w+")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_question: sa.ColumnElement[str] = sa.literal_column(QUESTION, sa.String)
# How much of what was said before its answer was given; the rest of the record is long.
_used: sa.ColumnElement[Any] = sa.literal_column(
    "CASE WHEN context IS NOT NULL THEN jsonb_build_object('kept', context -> 'kept', 'earlier',"
    " context -> 'earlier', 'memories', jsonb_array_length(context -> 'memories')) END",
    JSONB,
)
_words: sa.ColumnElement[Any] = sa.literal_column(WORDS)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn stands: in which conversation, and after which episode; None for a first turn."""

    conversation: str
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """A conversation with the title to show; None where it has neither a title nor a turn."""

    id: str
    title: str | None
    created_at: datetime
    updated_at: datetime
    metadata: dict[str, str]

    @property
    def cursor(self) -> str:
        """What the page after it begins behind; holds though the conversation moves or goes."""
        return f"{(self.updated_at - EPOCH) // timedelta(microseconds=1)}-{self.id}"


@dataclass(frozen=True, slots=True)
class TurnRow:
    """One question with its answer, and what its asker says of it now."""

    id: str
    parent_id: str | None
    question: str
    answer: str
    status: str
    finish_reason: str | None
    release: str
    created_at: datetime
    used: dict[str, int] | None = None
    thumb: int = 0
    reasons: tuple[str, ...] = ()
    comment: str | None = None
    correction: str | None = None
    steps: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Deletion:
    """What went with a conversation."""

    num_turns: int
    num_signals: int


def not_found(conversation_id: str, param: str = "conversation_id") -> NotFoundError:
    """Return the error for a conversation that is not there, or not there for the one who asks."""
    return NotFoundError(
        f"There is no conversation {conversation_id!r}. GET /v1/conversations lists yours.",
        code="conversation_not_found",
        param=param,
    )


def create(session: Session, user_id: str, title: str | None, metadata: Mapping[str, str] | None = None) -> Listed:
    """Begin a conversation within the caller's transaction."""
    users.meet(session, user_id)
    conversation = Conversation(id=new_id("cv"), user_id=user_id, title=title, labels=dict(metadata or {}))
    session.add(conversation)
    session.flush()
    session.refresh(conversation)
    return get(session, conversation.id, user_id)


def rename(session: Session, conversation_id: str, user_id: str, title: str | None) -> Listed:
    """Give a conversation a title, or (None) have it called by its first question again.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``.
    """
    own(session, conversation_id, user_id).title = title
    session.flush()
    return get(session, conversation_id, user_id)


def describe(session: Session, conversation_id: str, user_id: str, metadata: Mapping[str, str]) -> Listed:
    """Give a conversation other metadata.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``.
    """
    own(session, conversation_id, user_id).labels = dict(metadata)
    session.flush()
    return get(session, conversation_id, user_id)


def own(session: Session, conversation_id: str, user_id: str, *, lock: bool = False) -> Conversation:
    """Return a conversation's row.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``, for somebody else's, too.
    """
    conversation = session.get(Conversation, conversation_id, with_for_update=lock)
    if conversation is None or conversation.user_id != user_id:
        raise not_found(conversation_id)
    return conversation


def _listed() -> sa.Select[Any]:
    first_question = (
        sa.select(sa.func.left(_question, LOOKED_AT_CHARS))
        .select_from(Episode)
        .where(Episode.conversation_id == Conversation.id)
        .order_by(Episode.id)
        .limit(1)
        .scalar_subquery()
        .label("question")
    )
    return sa.select(
        Conversation.id,
        Conversation.title,
        Conversation.created_at,
        Conversation.updated_at,
        Conversation.labels,
        first_question,
    )


def _view(row: sa.Row[Any]) -> Listed:
    return Listed(row.id, row.title or title_of(row.question or ""), row.created_at, row.updated_at, row.labels)


def title_of(question: str) -> str | None:
    """Return the beginning of a question as a title, cut at a word; None where there is none."""
    text = " ".join(question.split())
    if len(text) <= MAX_TITLE_CHARS:
        return text or None
    whole_words = text[:MAX_TITLE_CHARS].rpartition(" ")[0]
    return (whole_words or text[: MAX_TITLE_CHARS - 1]) + "…"


def get(session: Session, conversation_id: str, user_id: str) -> Listed:
    """Return a conversation.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``, for somebody else's, too.
    """
    row = session.execute(
        _listed().where(Conversation.id == conversation_id, Conversation.user_id == user_id)
    ).one_or_none()
    if row is None:
        raise not_found(conversation_id)
    return _view(row)


def page(session: Session, user_id: str, before: str | None, limit: int, query: str = "") -> list[Listed]:
    """Return a user's conversations, the most recently used first.

    Parameters
    ----------
    before
        The cursor of the last one of the page before.
    query
        Words, all of which are in the title, or in one question with its answer; of the last, the beginning.
    """
    found = _listed().where(Conversation.user_id == user_id)
    if query.strip():
        found = found.where(_about(user_id, query))
    if before is not None:
        micros, _, last_id = before.partition("-")
        last = sa.tuple_(EPOCH + timedelta(microseconds=int(micros)), last_id)
        found = found.where(sa.tuple_(Conversation.updated_at, Conversation.id) < last)
    ordered = found.order_by(Conversation.updated_at.desc(), Conversation.id.desc())
    return [_view(row) for row in session.execute(ordered.limit(limit))]


def find_turns(session: Session, user_id: str, query: str, limit: int) -> list[TurnRow]:
    """Return turns of a user's conversations that hold all words of `query`, the newest first."""
    columns = (Episode.id, Episode.parent_id, sa.func.coalesce(_question, ""), Episode.answer, Episode.status)
    rest = (Episode.finish_reason, Episode.release, Episode.created_at)
    words = _sought(user_id, query)
    found = sa.select(*columns, *rest).where(
        sa.func.numnode(words) > 0, _holds(user_id, words), episodes.is_shown()
    )
    return [TurnRow(*row) for row in session.execute(found.order_by(Episode.id.desc()).limit(limit))]


def _owner(user_id: str) -> str:
    return f"by{hashlib.md5(user_id.encode(), usedforsecurity=False).hexdigest()}"


def _sought(user_id: str, query: str) -> sa.ColumnElement[Any]:
    """Return the words of a query; the last may still be being typed."""
    words: sa.ColumnElement[Any] = sa.func.plainto_tsquery("simple", query)
    # But what begins like the owner's mark would find all that is theirs.
    last = _WORD.findall(query.lower())[-1:]
    if last and not _owner(user_id).startswith(last[0]):
        words = _tsquery(sa.func.nullif(sa.cast(words, sa.Text), "").op("||")(":*"))
    return words


def _holds(user_id: str, words: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Return the condition that a turn of somebody's conversations holds words."""
    theirs = _tsquery(sa.literal(_owner(user_id)))
    return sa.and_(Episode.conversation_id.is_not(None), _words.op("@@")(theirs.op("&&")(words)))


def _about(user_id: str, query: str) -> sa.ColumnElement[bool]:
    words = _sought(user_id, query)
    turns = sa.select(Episode.conversation_id).where(_holds(user_id, words))
    title = sa.func.to_tsvector("simple", sa.func.coalesce(Conversation.title, ""))
    # Of a query without any word nothing is said: it finds nothing.
    return sa.and_(sa.func.numnode(words) > 0, sa.or_(title.op("@@")(words), Conversation.id.in_(turns)))


def _tsquery(text: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.cast(text, sa.Text).op("::")(sa.literal_column("tsquery"))


def turns(
    session: Session, conversation_id: str, user_id: str, before: str | None, limit: int
) -> Sequence[TurnRow]:
    """Return turns of a conversation, the newest first.

    Parameters
    ----------
    before
        The id of the last turn of the page before.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``.
    """
    own(session, conversation_id, user_id)
    query = sa.select(
        Episode.id,
        Episode.parent_id,
        sa.func.coalesce(_question, "").label("question"),
        Episode.answer,
        Episode.status,
        Episode.finish_reason,
        Episode.release,
        Episode.created_at,
        _used,
        Episode.steps,
    ).where(Episode.conversation_id == conversation_id, episodes.is_shown())
    if before is not None:
        query = query.where(Episode.id < before)
    rows = session.execute(query.order_by(Episode.id.desc()).limit(limit)).all()
    said: dict[str, dict[str, Any]] = {row.id: {"steps": row.steps} for row in rows}
    # Of these kinds, the slot is the episode.
    for signal in fold(signal for history in histories(session, said).values() for signal in history):
        if signal.user_id == user_id:
            said[signal.slot] |= _said(signal)
    return [TurnRow(*row[:-1], **said[row.id]) for row in rows]


def _said(signal: Standing) -> dict[str, Any]:
    if signal.kind == "thumb":
        return {"thumb": signal.value}
    if signal.kind == "reasons":
        return {"reasons": signal.reasons}
    return {signal.kind: signal.text} if signal.kind in ("comment", "correction") else {}


def refusals(session: Session, wanted: Collection[tuple[str, Place]]) -> dict[tuple[str, Place], EverloopError]:
    """Return why users cannot have their turns where they want them, of those who cannot.

    The codes are ``conversation_not_found`` and ``episode_not_found``, for somebody else's, too, and
    ``parent_elsewhere`` for a parent that is an episode of theirs, but not of this conversation.
    """
    if not wanted:
        return {}
    owners = dict(
        session.execute(
            sa.select(Conversation.id, Conversation.user_id).where(
                among(Conversation.id, {place.conversation for _, place in wanted})
            )
        ).all()
    )
    parents = {
        row.id: row
        for row in session.execute(
            sa.select(Episode.id, Episode.user_id, Episode.conversation_id).where(
                among(Episode.id, {place.parent for _, place in wanted if place.parent is not None})
            )
        )
    }

    def one(user_id: str, place: Place) -> EverloopError | None:
        if owners.get(place.conversation) != user_id:
            return not_found(place.conversation, param="conversation")
        if place.parent is None:
            return None
        parent = parents.get(place.parent)
        if parent is None or parent.user_id != user_id:
            return episodes.not_found(place.parent, param="parent")
        return None if parent.conversation_id == place.conversation else _elsewhere(place)

    return {key: refusal for key in wanted if (refusal := one(*key)) is not None}


def _elsewhere(place: Place) -> InvalidRequestError:
    return InvalidRequestError(
        f"{place.parent!r} is not a turn of {place.conversation!r}. Name a turn of this conversation, or none.",
        code="parent_elsewhere",
        param="parent",
    )


def delete(session: Session, conversation_id: str, user_id: str) -> Deletion:
    """Delete a conversation: withdraw what was said of its answers, blank its words, and have them taught no more.

    What was trained with them before stays until the user is forgotten.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``.
    """
    # In the order in which turns are written: first the user, then the conversation. Whoever says something about
    # one of the answers holds a weaker lock on the user: they end first, or find an answer without words.
    session.get(User, user_id, with_for_update=True)
    conversation = own(session, conversation_id, user_id, lock=True)
    turn_ids = session.scalars(sa.select(Episode.id).where(Episode.conversation_id == conversation_id)).all()
    num_signals = _delete_turns(session, user_id, turn_ids)
    session.delete(conversation)
    session.flush()
    return Deletion(len(turn_ids), num_signals)


def delete_turn(session: Session, episode_id: str, user_id: str) -> tuple[list[str], int]:
    """Delete one answer with its question, as :func:`delete` does a conversation.

    What it went on from after a yes is the same turn, and goes with it.
    What later turns were shown of it stays in them, until they or their conversation are deleted.

    Returns
    -------
    list of str
        Ids of all answers that went.
    int
        Signals that were withdrawn.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    """
    session.get(User, user_id, with_for_update=True)
    episode = episodes.get(session, episode_id, user_id)
    if not episode.messages:
        raise episodes.not_found(episode_id)
    turn = episodes.same_turn(session, episode_id)
    return turn, _delete_turns(session, user_id, turn)


def _delete_turns(session: Session, user_id: str, own: Sequence[str]) -> int:
    num_signals = _withdraw(session, user_id, own)
    words = sa.update(Feedback).where(among(Feedback.episode_id, own))
    nothing = {"text": None, "body_digest": "", "address_block": None}
    session.execute(words.values(**nothing).execution_options(synchronize_session=False))
    blank = sa.update(Episode).where(among(Episode.id, own))
    session.execute(blank.values(learn=False, **episodes.blanked()).execution_options(synchronize_session=False))
    session.execute(sa.delete(ToolCall).where(among(ToolCall.episode_id, own)))
    gone = [Entry(AnswerExcluded(episode_id=episode_id, by="owner"), episode_id) for episode_id in own]
    outbox.append_many(session, gone)  # after the withdrawals: what is left then are operators' judgements
    return num_signals


def _withdraw(session: Session, user_id: str, episode_ids: Sequence[str]) -> int:
    """Take back all that stands about episodes, whoever said it, by signals as any other; return how many."""
    slots = sa.union(
        sa.select(Feedback.slot).where(among(Feedback.episode_id, episode_ids)),
        # Another answer was preferred to one of these.
        sa.select(Feedback.slot).where(Feedback.user_id == user_id, among(Feedback.over, episode_ids)),
    )
    said = histories(session, session.scalars(slots)).values()
    standing = fold(signal for history in said for signal in history)
    for outcome in accept_many(session, [Withdrawal.of(signal) for signal in standing]) if standing else ():
        if isinstance(outcome, EverloopError):
            raise outcome
    return len(standing)
