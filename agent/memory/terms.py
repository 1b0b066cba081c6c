"""Which turns of a conversation have a word: an index of stems, of which a question looks up its own.

An answer that was corrected is found by the words of the correction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from agent.memory.vectors import WordVectors
from agent.memory.words import analyse, stem
from agent.tables import ConversationTerm
from feedback.episodes import Recording
from feedback.tables import Conversation, Episode
from infra.db import among

TURNS_PER_TERM = 48  # the newest turns with a word that the index names
MAX_TERMS = 160  # of one turn that go into the index
MAX_TERM_CHARS = 64

# Ids carry their time: the order of turns is theirs. Of a turn that is older than all of a full row nothing is
# noted, and it is counted only when it is new: so whoever indexes a turn again changes nothing.
INDEX = sa.text(f"""
    INSERT INTO conversation_terms (conversation_id, term, num_turns, turns)
    SELECT :conversation, term, 1, ARRAY[CAST(:turn AS varchar)] FROM unnest(CAST(:terms AS varchar[])) AS term
    ON CONFLICT (conversation_id, term) DO UPDATE SET
        num_turns = conversation_terms.num_turns + 1,
        turns = (ARRAY(SELECT unnest(conversation_terms.turns || excluded.turns) AS turn ORDER BY turn))[
            greatest(1, cardinality(conversation_terms.turns) + 2 - {TURNS_PER_TERM}):]
    WHERE :turn <> ALL (conversation_terms.turns)
        AND (cardinality(conversation_terms.turns) < {TURNS_PER_TERM} OR :turn > conversation_terms.turns[1])
""")
FORGET = sa.text("""
    UPDATE conversation_terms SET turns = array_remove(turns, CAST(:turn AS varchar)), num_turns = num_turns - 1
    WHERE conversation_id = :conversation AND :turn = ANY(turns) AND term <> ALL (CAST(:but AS varchar[]))
""")
LOOK_UP = sa.text("""
    SELECT term, num_turns, turns FROM conversation_terms
    WHERE conversation_id = :conversation AND term = ANY(CAST(:terms AS varchar[]))
""")
# The correction that stands, of the one whose answer it is; one that was taken back has no text.
CORRECTION = """
    SELECT text FROM feedback
    WHERE feedback.episode_id = episodes.id AND feedback.user_id = episodes.user_id
        AND feedback.kind = 'correction' AND feedback.slot = episodes.id
    ORDER BY feedback.seq DESC LIMIT 1
"""
READ = f"""
    SELECT id, conversation_id, coalesce((messages -> -1) ->> 'content', '') AS question,
        coalesce(({CORRECTION}), answer) AS answer
    FROM episodes WHERE id = ANY(CAST(:ids AS varchar[])) AND conversation_id IS NOT NULL ORDER BY id
"""
# Whoever deletes the turn waits for this, or this finds it without words.
NOW = sa.text(f"{READ} FOR SHARE")


def index(session: Session, recording: Recording) -> None:
    """Index the words of a turn that was just written."""
    if recording.answer and recording.messages:
        found = _terms(str(recording.messages[-1].get("content") or ""), recording.answer)
        _add(session, str(recording.conversation_id), recording.episode_id, found)


def index_again(session: Session, episode_ids: Collection[str]) -> None:
    """Index turns by what stands as their answers now: the correction, or the answer where that was taken back."""
    named = sa.select(Episode.conversation_id).where(among(Episode.id, set(episode_ids)))
    # Conversations before turns, as whoever deletes one does; one that is gone took its index along.
    locked = sa.select(Conversation.id).where(Conversation.id.in_(named)).order_by(Conversation.id)
    kept = set(session.scalars(locked.with_for_update(key_share=True)))
    for row in session.execute(NOW, {"ids": sorted(set(episode_ids))}).all():
        if row.conversation_id in kept:
            found = _terms(row.question, row.answer) if row.answer else []
            forget(session, row.conversation_id, row.id, but=found)
            _add(session, row.conversation_id, row.id, found)


def _add(session: Session, conversation: str, turn: str, found: list[str]) -> None:
    if found:
        session.execute(INDEX, {"conversation": conversation, "turn": turn, "terms": found})


def _terms(question: str, answer: str) -> list[str]:
    # A word may be as long as a message; an index takes no row of that size, and nobody looks for one.
    stems = {stem for stem in analyse(f"{question}\n{answer}").stems if len(stem) <= MAX_TERM_CHARS}
    return sorted(stems)[:MAX_TERMS]


def forget(session: Session, conversation: str, turn: str, but: Sequence[str] = ()) -> None:
    """Take a turn out of the index, but for some words."""
    session.execute(FORGET, {"conversation": conversation, "turn": turn, "but": list(but)})
    nothing = sa.func.cardinality(ConversationTerm.turns) == 0
    session.execute(sa.delete(ConversationTerm).where(ConversationTerm.conversation_id == conversation, nothing))


def find(
    session: Session, conversation: str, question: str, vectors: WordVectors | None, most: int
) -> Mapping[str, float]:
    """Return the turns that have words of the question, or words near to them, the best first."""
    wanted = _wanted(question, vectors)
    if not wanted:
        return {}
    rows = session.execute(LOOK_UP, {"conversation": conversation, "terms": list(wanted)}).all()
    most_turns = max((row.num_turns for row in rows), default=1)
    scores: dict[str, float] = defaultdict(float)
    for row in rows:
        rarity = math.log(1.0 + 2.0 * most_turns / row.num_turns)
        for turn in row.turns:
            scores[turn] += wanted[row.term] * rarity
    # The id of a later turn is larger: of equals the newer.
    order = sorted(scores, key=lambda turn: (scores[turn], turn), reverse=True)
    return {turn: scores[turn] for turn in order[:most]}


def _wanted(question: str, vectors: WordVectors | None) -> dict[str, float]:
    analysis = analyse(question)
    wanted = dict.fromkeys(analysis.stems, 1.0)
    words: Sequence[str] = list(dict.fromkeys(analysis.all_content))
    for near in vectors.near(words) if vectors is not None else ():
        for word, nearness in near:
            wanted.setdefault(stem(word), nearness)
    return wanted
