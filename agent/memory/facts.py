"""What people said of themselves, kept across their conversations: shown to them, changed and deleted by them.

It is taken from their own questions by a few patterns, never from an answer, and only from conversations that are
kept: a wrong memory is worse than none. What somebody says anew takes the place of what they said before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from agent.memory.words import analyse
from agent.tables import Memory, MemoryChoice
from feedback.episodes import Recording
from feedback.steps import goes_on, is_ones_own
from feedback.tables import Conversation
from infra.access.roles import ANONYMOUS
from infra.db import among
from infra.errors import NotFoundError
from infra.ids import new_id

MAX_CHARS = 200
MAX_MEMORIES = 200  # of one person; beyond, the one that was said longest ago goes
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_OPENS = (
    r"^(?:(?:hi|hello|hey|ok|okay|well|and|but|so|also|by the way|actually|please|just so you know)\b[,!]?\s*)*"
)
_REST = r"(?P<rest>\S.{0,180})"

# (slot, pattern): what fills the same slot replaces what did before. `{rest}` is the first words of what is said.
PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (slot, re.compile(_OPENS + pattern, re.IGNORECASE))
    for slot, pattern in (
        ("name", r"(?:my name is|call me|i am called|i'm called)\s+" + _REST),
        ("home", r"i(?:'m| am)? (?:now )?(?:live|living) in\s+" + _REST),
        ("home", r"i (?:just |recently )?moved to\s+" + _REST),
        ("origin", r"i(?:'m| am| come) from\s+" + _REST),
        ("birthday", r"my birthday is\s+" + _REST),
        ("age", r"i(?:'m| am)\s+(?P<rest>\d{1,3} years old)"),
        ("work", r"i work (?:as|at|for|in)\s+" + _REST),
        ("allergy {rest}", r"i(?:'m| am) allergic to\s+" + _REST),
        ("diet", r"i(?:'m| am) (?:a |an )?(?P<rest>(?:vegetarian|vegan|pescatarian)\b.{0,80})"),
        ("favourite {rest}", r"my favou?rite\s+(?P<rest>\S.{0,120})"),
        ("preference {rest}", r"i(?:'d| would)? (?:always |usually |really )?(?:prefer|rather)\s+" + _REST),
        ("note {rest}", r"(?:do |always )?remember(?: this| that)?[:,]?\s+" + _REST),
        ("note {rest}", r"don'?t forget(?: that)?[:,]?\s+" + _REST),
    )
)
_NOT_ONES_OWN = re.compile(r"^(?:to|when|how|what|if|me\b|the time|whether|where|who|why)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Found:
    """Something that somebody said of themselves, in their words."""

    slot: str
    text: str


def find(question: str) -> list[Found]:
    """Return what a message says that is to be remembered; nothing of questions, or of what is only supposed."""
    found: dict[str, Found] = {}
    for match in _SENTENCE.finditer(question.replace("’", "'")):
        sentence = match.group().strip()
        if sentence.endswith("?") or len(sentence) > MAX_CHARS:
            continue
        for slot, pattern in PATTERNS:
            said = pattern.match(sentence)
            if said is None:
                continue
            rest = said["rest"].rstrip(" .!")
            if slot.startswith("note") and _NOT_ONES_OWN.match(rest):
                continue
            full = slot.format(rest=_key(slot, rest))
            text = rest if slot.startswith("note") else sentence[said.start() :].rstrip(" .!")
            found[full] = Found(full, text)
            break
    return list(found.values())


def _key(slot: str, rest: str) -> str:
    """Return what makes two of a kind the same: what something is said of, else the words of it."""
    if slot.startswith(("favourite", "note")):
        rest = re.split(r"\s+(?:is|are|was)\s+", rest, maxsplit=1)[0]
    return " ".join(sorted(set(analyse(rest).stems)))[:120]


def take_all(session: Session, recordings: Iterable[Recording], *, by_default: bool) -> None:
    """Remember what questions say, within the transaction that writes their turns."""
    kept = [r for r in recordings if r.conversation_id is not None and r.user_id != ANONYMOUS and _counts(r)]
    said = [(r, found) for r in kept if (found := find(str(r.messages[-1].get("content") or "")))]
    if not said:
        return
    there = sa.select(Conversation.id).where(among(Conversation.id, {str(r.conversation_id) for r, _ in said}))
    known = set(session.scalars(there))
    for recording, found in said:
        if recording.conversation_id in known and wants(session, recording.user_id, by_default=by_default):
            for each in found:
                _keep(session, recording.user_id, each, recording.episode_id, recording.conversation_id)
            _forget_oldest(session, recording.user_id)


def _counts(recording: Recording) -> bool:
    """Tell whether a turn's question is the person's own, new, and to be kept."""
    if not recording.messages or goes_on(recording.steps) or (recording.request or {}).get("unstored"):
        return False
    return is_ones_own(recording.messages[-1])


def _keep(session: Session, user_id: str, found: Found, episode_id: str | None, conversation: str | None) -> str:
    values: dict[str, str | None] = {"user_id": user_id, "slot": found.slot, "text": found.text}
    values |= {"episode_id": episode_id, "conversation_id": conversation}
    row = insert(Memory).values(id=new_id("me"), **values)
    changes = {name: row.excluded[name] for name in ("text", "episode_id", "conversation_id")}
    row = row.on_conflict_do_update(
        index_elements=["user_id", "slot"], set_={**changes, "updated_at": sa.func.now()}
    )
    return str(session.scalar(row.returning(Memory.id)))


def _forget_oldest(session: Session, user_id: str) -> None:
    newest = sa.select(Memory.id).where(Memory.user_id == user_id).order_by(Memory.updated_at.desc(), Memory.id)
    session.execute(sa.delete(Memory).where(Memory.id.in_(newest.offset(MAX_MEMORIES))))


def wants(session: Session, user_id: str, *, by_default: bool) -> bool:
    """Tell whether somebody is to be remembered across conversations."""
    choice = session.get(MemoryChoice, user_id)
    return by_default if choice is None else choice.remember


def known(session: Session, user_id: str, *, by_default: bool) -> list[tuple[str, str]]:
    """Return ids and texts of what is remembered of somebody, the newest first; nothing if they do not want it."""
    choice = sa.select(MemoryChoice.remember).where(MemoryChoice.user_id == user_id).scalar_subquery()
    query = sa.select(Memory.id, Memory.text).where(Memory.user_id == user_id, sa.func.coalesce(choice, by_default))
    return [(row.id, row.text) for row in session.execute(query.order_by(Memory.updated_at.desc(), Memory.id))]


def choose(session: Session, user_id: str, *, remember: bool) -> None:
    """Note whether somebody wants to be remembered; what was remembered before stays until they delete it."""
    row = insert(MemoryChoice).values(user_id=user_id, remember=remember)
    session.execute(row.on_conflict_do_update(index_elements=["user_id"], set_={"remember": remember}))


def of_user(session: Session, user_id: str) -> Sequence[Memory]:
    """Return what is remembered of somebody, the newest first."""
    query = sa.select(Memory).where(Memory.user_id == user_id)
    return session.scalars(query.order_by(Memory.updated_at.desc(), Memory.id)).all()


def add(session: Session, user_id: str, text: str) -> Memory:
    """Remember a sentence that somebody wrote down themselves."""
    found = next(iter(find(text)), None)
    slot = found.slot if found else f"note {_key('note', text) or text[:120]}"
    memory_id = _keep(session, user_id, Found(slot, text), None, None)
    _forget_oldest(session, user_id)
    return session.get_one(Memory, memory_id, populate_existing=True)


def change(session: Session, user_id: str, memory_id: str, text: str) -> Memory:
    """Correct a memory; it keeps its place and its source.

    Raises
    ------
    NotFoundError
        Code ``memory_not_found``, for somebody else's, too.
    """
    memory = _own(session, user_id, memory_id)
    memory.text = text
    memory.updated_at = session.scalar(sa.select(sa.func.now()))  # type: ignore[assignment]
    session.flush()
    return memory


def delete(session: Session, user_id: str, memory_id: str) -> None:
    """Forget one memory.

    Raises
    ------
    NotFoundError
        Code ``memory_not_found``, for somebody else's, too.
    """
    session.delete(_own(session, user_id, memory_id))


def _own(session: Session, user_id: str, memory_id: str) -> Memory:
    memory = session.get(Memory, memory_id)
    if memory is None or memory.user_id != user_id:
        raise NotFoundError(
            f"There is no memory {memory_id!r}. GET /v1/memories lists yours.",
            code="memory_not_found",
            param="memory_id",
        )
    return memory
