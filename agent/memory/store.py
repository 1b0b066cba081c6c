"""The past of a turn, out of the raw log: a bounded number of candidates, however long the conversation is.

Each turn stands on a line, at a depth: the number of turns before it. Whoever goes on from a turn that something
follows already begins a line of their own, which remembers where it left. So the past of a turn is a few ranges of
lines, and nobody walks from parent to parent. Where words stand :mod:`agent.memory.terms` knows. What a person
corrected is there as they corrected it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from agent.memory import sentences, terms
from agent.memory.encoding import NOT_ASKED, Asking
from agent.memory.importance import Chunk
from agent.memory.sentences import Sentence
from agent.memory.vectors import WordVectors
from agent.tables import Line, Memory, TurnPlace
from feedback import conversations
from feedback.episodes import Recording
from feedback.tables import Conversation
from infra.db import among

MOST_TURNS = 50  # that are looked at for one context, pinned ones besides
RECENT_TURNS = 24  # of these the newest, whatever is asked
OPENING_TURNS = 2  # and the first
FOUND_TURNS = 24  # and those that have words of the question, or words near to them
MAX_PINNED = 20
MAX_FORKS = 200  # on the way back; what lies before more is not looked for

# LIMIT has each part read by its index, whatever the planner takes for the number of lines on the way.
WAY = sa.text(f"""
    WITH RECURSIVE way AS (
        SELECT line, depth AS until, 0 AS num FROM turn_places
        WHERE episode_id = :parent AND conversation_id = :conversation
        UNION ALL
        SELECT lines.from_line, lines.from_depth, num + 1
        FROM way JOIN conversation_lines AS lines ON lines.id = way.line
        WHERE lines.from_line IS NOT NULL AND num < {MAX_FORKS}
    )
    SELECT place.episode_id, place.depth, place.pinned FROM way CROSS JOIN LATERAL (
        (SELECT * FROM turn_places WHERE line = way.line AND depth <= way.until
            AND depth > (SELECT until FROM way WHERE num = 0) - {MOST_TURNS} ORDER BY depth DESC LIMIT {MOST_TURNS})
        UNION ALL
        (SELECT * FROM turn_places WHERE line = way.line AND depth <= way.until AND depth < {OPENING_TURNS}
            LIMIT {OPENING_TURNS})
    ) AS place
    UNION
    SELECT place.episode_id, place.depth, place.pinned FROM (
        (SELECT * FROM turn_places WHERE conversation_id = :conversation AND pinned LIMIT {MAX_PINNED})
        UNION ALL
        (SELECT * FROM turn_places WHERE episode_id = ANY(CAST(:found AS varchar[])) LIMIT {2 * MOST_TURNS})
    ) AS place JOIN way ON place.line = way.line AND place.depth <= way.until
""")
TEXTS = sa.text(f"""
    SELECT id, coalesce(corrected.text, answer) AS answer, coalesce((messages -> -1) ->> 'content', '') AS question,
        corrected.text IS NOT NULL AS corrected
    FROM episodes LEFT JOIN LATERAL ({terms.CORRECTION}) AS corrected ON true
    WHERE id = ANY(CAST(:ids AS varchar[]))
""")

# The places of all turns of a conversation: of those that follow one turn, the first goes on with its line.
PLACE_AGAIN = sa.text("""
    WITH RECURSIVE turns AS (
        SELECT id, parent_id, row_number() OVER (PARTITION BY parent_id ORDER BY id) = 1 AS goes_on
        FROM episodes WHERE conversation_id = :conversation
    ), placed AS (
        SELECT id, id AS line, 0 AS depth, CAST(NULL AS varchar) AS from_line, CAST(NULL AS integer) AS from_depth
        FROM turns WHERE parent_id IS NULL
        UNION ALL
        SELECT turns.id, CASE WHEN goes_on THEN placed.line ELSE turns.id END, placed.depth + 1,
            CASE WHEN goes_on THEN NULL ELSE placed.line END, CASE WHEN goes_on THEN NULL ELSE placed.depth END
        FROM turns JOIN placed ON turns.parent_id = placed.id
    ), lines AS (
        INSERT INTO conversation_lines (id, conversation_id, from_line, from_depth)
        SELECT id, :conversation, from_line, from_depth FROM placed WHERE id = line
    )
    INSERT INTO turn_places (episode_id, conversation_id, line, depth, pinned)
    SELECT id, :conversation, line, depth, id = ANY(CAST(:pinned AS varchar[])) FROM placed
""")


@dataclass(frozen=True, slots=True)
class Past:
    """What may go into a context, in order, and how many messages there were in all."""

    chunks: list[Chunk]
    num_messages: int


def place_all(session: Session, recordings: Iterable[Recording]) -> None:
    """Give turns of conversations their places and index their words, within the transaction that writes them.

    Their conversations are locked by it: of two turns that follow the same one, one comes first.
    """
    kept = [recording for recording in recordings if recording.conversation_id is not None]
    if not kept:
        return
    there = sa.select(Conversation.id).where(among(Conversation.id, {str(r.conversation_id) for r in kept}))
    known = set(session.scalars(there))
    for recording in kept:
        if recording.conversation_id in known:
            _place(session, recording)
            terms.index(session, recording)


def _place(session: Session, recording: Recording) -> None:
    conversation, own = str(recording.conversation_id), recording.episode_id
    parent = _placed(session, conversation, recording.parent_id) if recording.parent_id else None
    if session.get(TurnPlace, own) is not None:  # with all the others, just now
        return
    line, depth = own, 0
    if parent is not None:
        depth = parent.depth + 1
        follows = sa.select(TurnPlace.episode_id).where(TurnPlace.line == parent.line, TurnPlace.depth == depth)
        line = parent.line if session.scalar(follows) is None else own
    if line == own:
        left = (parent.line, parent.depth) if parent else (None, None)
        session.add(Line(id=own, conversation_id=conversation, from_line=left[0], from_depth=left[1]))
    session.add(TurnPlace(episode_id=own, conversation_id=conversation, line=line, depth=depth))
    session.flush()


def _placed(session: Session, conversation: str, episode_id: str) -> TurnPlace | None:
    """Return a turn's place; where an earlier version wrote it, all of the conversation are given theirs first."""
    place = session.get(TurnPlace, episode_id)
    if place is None:
        session.get(Conversation, conversation, with_for_update=True)
        pinned = sa.select(TurnPlace.episode_id).where(TurnPlace.conversation_id == conversation, TurnPlace.pinned)
        values = {"conversation": conversation, "pinned": list(session.scalars(pinned))}
        for table in (TurnPlace, Line):
            session.execute(sa.delete(table).where(table.conversation_id == conversation))
        session.execute(PLACE_AGAIN, values)
        session.expire_all()
        place = session.get(TurnPlace, episode_id)
    return place


def delete_turn(session: Session, episode_id: str, user_id: str) -> int:
    """Delete a turn of a person with all that was remembered of it; return the signals withdrawn.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    """
    gone, num_signals = conversations.delete_turn(session, episode_id, user_id)
    for each in gone:
        forget_turn(session, each)
    return num_signals


def forget_turn(session: Session, episode_id: str) -> None:
    """Take out what a deleted turn left: what was remembered of it, its words, its pin. Its place stays a place."""
    session.execute(sa.delete(Memory).where(Memory.episode_id == episode_id))
    sentences.forget(session, [episode_id])
    place = session.get(TurnPlace, episode_id)
    if place is None:
        return
    place.pinned = False
    terms.forget(session, place.conversation_id, episode_id)


def past(
    session: Session,
    conversation: str,
    parent: str | None,
    question: str,
    vectors: WordVectors | None,
    asking: Asking = NOT_ASKED,
) -> Past:
    """Return what was said up to a turn and may matter for a question: the newest, what is found, what is pinned.

    Parameters
    ----------
    parent
        The turn that the question follows; None for a first one.
    asking
        The question's vector, where there is an encoder.
    """
    if parent is None:
        return Past([], 0)
    found = list(terms.find(session, conversation, question, vectors, MOST_TURNS))
    asked, nearest = _nearest(session, conversation, asking)
    found = _by_turns(nearest, found)
    values = {"conversation": conversation, "parent": parent, "found": found[: 2 * MOST_TURNS]}
    places = {row.episode_id: row for row in session.execute(WAY, values)}
    if parent not in places:  # as an earlier version wrote it
        _placed(session, conversation, parent)
        places = {row.episode_id: row for row in session.execute(WAY, values)}
    if parent not in places:
        return Past([], 0)
    last_depth = places[parent].depth
    chosen = _chosen(places, found, last_depth)
    rows = {row.id: row for row in session.execute(TEXTS, {"ids": chosen})}
    near = sentences.nearness(session, chosen, asked) if asked is not None else {}
    chunks: list[Chunk] = []
    num_missed = 0
    for place in sorted((places[turn] for turn in chosen if turn in rows), key=lambda place: place.depth):
        row = rows[place.episode_id]
        num_missed += 0 if row.answer else 2
        if row.answer:  # a question without one would put two in a row
            marks = {"turn": row.id, "pinned": place.pinned, "corrected": row.corrected}
            for is_answer, text in enumerate((row.question, row.answer)):
                role, position = ("user", "assistant")[is_answer], 2 * place.depth + is_answer
                nearness = near.get((row.id, bool(is_answer)))
                chunks.append(Chunk(role, text, position=position, nearness=nearness, **marks))
    chunks = [chunk for chunk in chunks if chunk.text.strip()]
    if 2 * sum(chunk.nearness is not None for chunk in chunks) <= len(chunks):  # words tell of more of them
        chunks = [replace(chunk, nearness=None) for chunk in chunks]
    return Past(chunks, max(2 * (last_depth + 1) - num_missed, len(chunks)))


def _nearest(session: Session, conversation: str, asking: Asking) -> tuple[Sentence | None, Sequence[str]]:
    """Return what is asked, and the turns that are nearest to it; None where nobody has read it, or found any."""
    if (asked := asking.result()) is None:
        return None, []
    try:
        with session.begin_nested():
            return asked, sentences.find(session, conversation, asked, MOST_TURNS)
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        # The extension has gone, its library has, or it is another.
        asking.fail(f"the database finds nothing by vectors, see `everloop doctor`: {error.orig}")
        return None, []


def _by_turns(some: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return turns that two ways have found, the best of each first."""
    pairs = itertools.zip_longest(some, others)
    return list(dict.fromkeys(turn for pair in pairs for turn in pair if turn is not None))


def _chosen(places: Mapping[str, Any], found: Sequence[str], last_depth: int) -> list[str]:
    """Return the turns to look at: the newest, the first and the pinned; what was found; more of the newest."""
    newest = sorted(places, key=lambda turn: -places[turn].depth)
    sure = [
        turn
        for turn in newest
        if places[turn].depth > last_depth - RECENT_TURNS
        or places[turn].depth < OPENING_TURNS
        or places[turn].pinned
    ]
    best = [turn for turn in found if turn in places and turn not in set(sure)][:FOUND_TURNS]
    chosen = dict.fromkeys([*sure, *best])
    room = max(MOST_TURNS + sum(places[turn].pinned for turn in chosen) - len(chosen), 0)
    return [*chosen, *[turn for turn in newest if turn not in chosen][:room]]


def pin(session: Session, conversation: str, episode_id: str, *, pinned: bool) -> bool:
    """Pin a turn to every context of its conversation, or let go of it; return whether there is such a turn."""
    place = _placed(session, conversation, episode_id)
    if place is None or place.conversation_id != conversation:
        return False
    place.pinned = pinned
    return True


def pinned(session: Session, conversation: str) -> list[str]:
    """Return the pinned turns of a conversation, the first first."""
    query = sa.select(TurnPlace.episode_id).where(TurnPlace.conversation_id == conversation, TurnPlace.pinned)
    return list(session.scalars(query.order_by(TurnPlace.depth, TurnPlace.episode_id)))
