"""Which turns say what a question asks for, in whatever words: vectors of turns, in pgvector's index.

They are made after a turn is written (:mod:`agent.memory.encoding`) of what stands then, the correction where there
is one. What deletes or corrects a turn deletes its vectors; whoever makes them writes none for words that are gone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from agent.memory import terms
from agent.tables import TurnVector
from feedback.tables import Conversation, Episode
from infra.db import among

ITERATIVE = sa.text("SET LOCAL hnsw.iterative_scan = 'relaxed_order'")
# The newest first: an answer that was just given is likely to be asked about next. A deleted turn has a place, and
# is of no conversation.
MISSING = sa.text("""
    SELECT place.episode_id FROM turn_places AS place
    JOIN episodes ON episodes.id = place.episode_id AND episodes.conversation_id = place.conversation_id
    WHERE place.conversation_id = :conversation AND NOT EXISTS (
        SELECT FROM turn_vectors AS own WHERE own.episode_id = place.episode_id AND own.encoder = :encoder
            AND own.conversation_id = :conversation)
    ORDER BY place.episode_id DESC LIMIT :most
""")


WORDS = sa.text(terms.READ)
Vectors = tuple[Sequence[float] | None, Sequence[float] | None]
"""Of a question and its answer; None of what has no words."""


@dataclass(frozen=True)
class Sentence:
    """A text as an encoder reads it: a vector of length 1."""

    encoder: str
    vector: Sequence[float]

    @cached_property
    def literal(self) -> str:
        """The vector as PostgreSQL writes it."""
        return f"[{','.join(map(repr, self.vector))}]"

    @property
    def distance(self) -> str:
        """SQL for how far a row is from it; as the index has it, so that the index is used."""
        return f"CAST(embedding AS vector({len(self.vector)})) <=> CAST(:asked AS vector)"


@dataclass(frozen=True, slots=True)
class Words:
    """What a turn says now; nothing where it is deleted."""

    turn: str
    conversation: str
    question: str
    answer: str


def find(session: Session, conversation: str, asked: Sentence, most: int) -> list[str]:
    """Return the turns of a conversation that are nearest to what is asked, the nearest first."""
    session.execute(ITERATIVE)
    nearest = sa.text(f"""
        SELECT episode_id FROM turn_vectors
        WHERE conversation_id = :conversation AND encoder = :encoder AND embedding IS NOT NULL
        ORDER BY {asked.distance} LIMIT :most
    """)
    values = {"conversation": conversation, "encoder": asked.encoder, "asked": asked.literal, "most": 2 * most}
    return list(dict.fromkeys(session.scalars(nearest, values)))[:most]


def nearness(session: Session, turns: Collection[str], asked: Sentence) -> Mapping[tuple[str, bool], float]:
    """Return how near (cosine) turns are to what is asked; by turn, and whether it is its answer."""
    query = sa.text(f"""
        SELECT episode_id, is_answer, 1 - ({asked.distance}) AS nearness FROM turn_vectors
        WHERE episode_id = ANY(CAST(:turns AS varchar[])) AND encoder = :encoder AND embedding IS NOT NULL
    """)
    values = {"turns": list(turns), "encoder": asked.encoder, "asked": asked.literal}
    return {(row.episode_id, row.is_answer): row.nearness for row in session.execute(query, values)}


def missing(session: Session, conversation: str, encoder: str, most: int) -> list[Words]:
    """Return turns of a conversation that an encoder has not read, the newest first."""
    values = {"conversation": conversation, "encoder": encoder, "most": most}
    return _words(session, session.scalars(MISSING, values).all())


def keep(session: Session, encoder: str, read: Sequence[tuple[Words, Vectors]]) -> int:
    """Write the vectors of turns that still say what was read; return of how many."""
    # Conversations before turns, as whoever deletes one does. Whoever corrects or deletes a turn waits for this,
    # and finds these rows; where they came first, the words are read anew after that.
    there = sa.select(Conversation.id).where(among(Conversation.id, {words.conversation for words, _ in read}))
    kept = set(session.scalars(there.order_by(Conversation.id).with_for_update(key_share=True, read=True)))
    turns = sorted(words.turn for words, _ in read if words.conversation in kept)
    locked = sa.select(Episode.id).where(among(Episode.id, turns)).order_by(Episode.id)
    session.scalars(locked.with_for_update(key_share=True)).all()
    now = {each.turn: each for each in _words(session, turns)}
    rows: list[dict[str, Any]] = [
        {
            "episode_id": words.turn,
            "conversation_id": words.conversation,
            "is_answer": is_answer,
            "encoder": encoder,
            "embedding": vectors[is_answer],
        }
        for words, vectors in read
        if now.get(words.turn) == words
        for is_answer in (False, True)
    ]
    if rows:
        written = insert(TurnVector).values(rows)
        renewed = {name: written.excluded[name] for name in ("encoder", "embedding")}
        session.execute(written.on_conflict_do_update(index_elements=["episode_id", "is_answer"], set_=renewed))
    return len(rows) // 2


def forget(session: Session, turns: Collection[str]) -> None:
    """Delete the vectors of turns that were deleted, or say something else now."""
    session.execute(sa.delete(TurnVector).where(among(TurnVector.episode_id, set(turns))))


def _words(session: Session, turns: Sequence[str]) -> list[Words]:
    rows = {row.id: row for row in session.execute(WORDS, {"ids": list(turns)})}
    found = (rows[turn] for turn in turns if turn in rows)
    return [
        Words(row.id, row.conversation_id, row.question if row.answer else "", row.answer or "") for row in found
    ]
