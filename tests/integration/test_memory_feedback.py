"""What people say of answers, and memory: a corrected answer is remembered as it should have been."""

from __future__ import annotations

import itertools

import pytest
import sqlalchemy as sa

from agent.memory import learning, store, votes
from agent.memory.learning import LEARNED
from agent.tables import ConversationTerm, MemoryVote
from feedback import acceptance, conversations, erasure
from feedback.signals import read_signal
from feedback.tables import Episode, Feedback
from infra.events import AnswerExcluded, FeedbackGiven, UserForgotten
from infra.log.consumer import Delivery
from tests.integration.test_memory import USER, asked, remembering, talking

KEYS = itertools.count()


def said_of(database, episode_id, kind, **fields):
    """Say something of an answer as the API does; return the event, and its seq, as the consumer gets it."""
    signal = {"episode_id": episode_id, "user": USER, "kind": kind, "idempotency_key": f"k{next(KEYS)}", **fields}
    with database.begin() as session:
        accepted = acceptance.accept(session, read_signal.validate_python(signal))
    with database() as session:
        row = session.scalars(sa.select(Feedback).where(Feedback.id == accepted.id)).one()
        names = ("seq", "episode_id", "user_id", "kind", "slot", "value", "text")
        return FeedbackGiven(feedback_id=row.id, **{name: getattr(row, name) for name in names})


def consume(database, *events):
    with database.begin() as session:
        votes.on_given(session, [Delivery(event, event.feedback_id) for event in events])


def terms(database):
    with database() as session:
        return {row.term: list(row.turns) for row in session.scalars(sa.select(ConversationTerm)) if row.turns}


@pytest.fixture
def wrong(database):
    """A wrong answer, long ago."""

    async def work(talk):
        wrong = parent = await talk.say("Which ferry do we take?", "You take the Aurora at noon.")
        for number in range(60):
            parent = await talk.say(f"Tell me of station {number} and its trains, please.", parent=parent)
        return talk, wrong, parent

    return talking(database, work)


def shown(database, base_model_dir, talk, last, question):
    made = remembering(database, base_model_dir, memory_tokens=300).prompt(asked(question, talk, last))
    return "\n".join(message["content"] for message in made.messages[:-1])


def test_a_corrected_answer_is_remembered_as_it_should_have_been(database, base_model_dir, wrong):
    talk, episode_id, last = wrong
    given = said_of(database, episode_id, "correction", text="You take the Borealis from the pier of Marstrand.")
    consume(database, given)
    text = shown(database, base_model_dir, talk, last, "When does it leave Marstrand?")
    assert "Borealis" in text and "Aurora" not in text
    with database() as session:
        assert session.get_one(Episode, episode_id).answer == "You take the Aurora at noon.", "the log was changed"

    again = said_of(database, episode_id, "correction", text="You take the Corona from the pier of Lysekil.")
    consume(database, given, again, given)  # the first once more: a replay
    assert "Corona" in shown(database, base_model_dir, talk, last, "When does it leave Lysekil?")
    assert "borealis" not in terms(database) and terms(database)["lysekil"] == [episode_id]

    undone = said_of(database, episode_id, "correction", value=0)
    consume(database, undone)
    text = shown(database, base_model_dir, talk, last, "Was the Aurora at noon?")
    assert "Aurora" in text and "Corona" not in text and "lysekil" not in terms(database)


def test_reading_a_correction_again_changes_nothing(database, wrong):
    _, episode_id, _ = wrong
    given = said_of(database, episode_id, "correction", text="You take the train 12 to station 7.")
    consume(database, given)
    with database() as session:
        before = session.execute(sa.select(ConversationTerm.term, ConversationTerm.num_turns)).all()
    first = terms(database)
    consume(database, given, given)
    with database() as session:
        assert session.execute(sa.select(ConversationTerm.term, ConversationTerm.num_turns)).all() == before
    assert terms(database) == first
    assert first["train"] == sorted(first["train"]), "an old turn stands among the newest"


@pytest.mark.parametrize("how", ["turn deleted", "conversation deleted", "forgotten"])
def test_no_word_of_a_correction_outlives_its_answer(database, wrong, how):
    talk, episode_id, last = wrong
    given = said_of(database, episode_id, "correction", text="You take the Borealis from Marstrand.")
    consume(database, given)
    assert "boreali" in terms(database)
    with database.begin() as session:
        if how == "turn deleted":
            conversations.delete_turn(session, episode_id, USER)
            store.forget_turn(session, episode_id)
        elif how == "conversation deleted":
            conversations.delete(session, talk.conversation, USER)
        else:
            erasure.forget(session, USER, "retrain-required")
    consume(database, given)  # comes late
    assert not {"boreali", "marstrand"} & terms(database).keys()
    with database.begin() as session:
        past = store.past(session, talk.conversation, last if how == "turn deleted" else None, "Borealis?", None)
    assert not any("Borealis" in chunk.text for chunk in past.chunks)


@pytest.fixture
def tried(database):
    """Three answers whose contexts were built with weights a little off."""

    async def work(talk):
        drawn = [dict.fromkeys(LEARNED, size) for size in (1.0, -0.5, 2.0)]
        return [
            await talk.say(f"Number {number}?", context={"drawn": offsets}) for number, offsets in enumerate(drawn)
        ]

    return talking(database, work)


def in_force(database):
    with database() as session:
        return learning.current(session)


def near(state, other):
    assert state.shift == pytest.approx(other.shift, abs=1e-6)
    assert state.baseline == pytest.approx(other.baseline)
    return True


def test_of_each_answer_the_last_thumb_counts_and_one_that_is_undone_is_taken_back(database, tried):
    first, second, _ = tried
    up = said_of(database, first, "thumb", value=1)
    consume(database, up)
    only_first = in_force(database)
    assert only_first.num_votes == 1 and min(only_first.shift.values()) > 0
    consume(database, up, said_of(database, first, "thumb", value=1))  # again, and once more said
    assert in_force(database) == only_first

    consume(database, said_of(database, second, "thumb", value=-1))
    undone = said_of(database, second, "thumb", value=0)
    consume(database, undone)
    left = in_force(database)
    assert left.num_votes == 1
    decayed = {name: (1 - learning.DECAY) * value for name, value in only_first.shift.items()}
    assert left.shift == pytest.approx(decayed, abs=1e-6), "what was taken back has left more than the decay"

    consume(database, said_of(database, first, "thumb", value=-1), up)  # changed their mind; the first comes late
    assert in_force(database).num_votes == 1 and max(in_force(database).shift.values()) < 0
    consume(database, said_of(database, first, "thumb", value=0))
    assert in_force(database).shift == pytest.approx(dict.fromkeys(LEARNED, 0.0), abs=1e-6)
    assert in_force(database).num_votes == 0


def test_a_thumb_from_before_a_reset_is_not_taken_back_from_what_came_after(database, tried):
    consume(database, said_of(database, tried[0], "thumb", value=1))
    with database.begin() as session:
        learning.reset(session, "thumb")
    consume(database, said_of(database, tried[1], "thumb", value=1))
    before = in_force(database)
    consume(database, said_of(database, tried[0], "thumb", value=0))
    assert near(in_force(database), before)


@pytest.mark.parametrize("who", ["mallory", ""])
def test_only_the_thumb_of_whose_answer_it_is_counts(database, tried, who):
    given = said_of(database, tried[0], "thumb", value=1)
    with database.begin() as session:  # as one that got past the door
        session.execute(sa.update(Feedback).where(Feedback.id == given.feedback_id).values(user_id=who))
    consume(database, given)
    assert in_force(database).version == 0


@pytest.mark.parametrize("how", ["excluded", "deleted", "forgotten"])
def test_what_may_not_be_learned_from_any_more_is_taken_back(database, tried, how):
    given = said_of(database, tried[0], "thumb", value=1)
    consume(database, given)
    assert in_force(database).num_votes == 1
    with database.begin() as session:
        if how == "excluded":
            session.get_one(Episode, tried[0]).excluded = True
        elif how == "deleted":
            conversations.delete_turn(session, tried[0], USER)
        else:
            erasure.forget(session, USER, "retrain-required")
            tombstone = session.get_one(Episode, tried[0]).user_id
    with database.begin() as session:
        if how == "forgotten":
            votes.on_forgotten(session, [Delivery(UserForgotten(erasure_id="er_1", tombstone=tombstone), "er_1")])
        else:
            votes.on_excluded(session, [Delivery(AnswerExcluded(episode_id=tried[0]), "ex_1")])
    assert in_force(database).num_votes == 0
    assert in_force(database).shift == pytest.approx(dict.fromkeys(LEARNED, 0.0), abs=1e-6)
    consume(database, given)  # comes late
    assert in_force(database).num_votes == 0
    with database() as session:
        assert session.get_one(MemoryVote, tried[0]).moved is None
