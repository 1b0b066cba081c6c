"""What is remembered of people: exported only as part of answers that may be learned from; whole for themselves."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from agent.book import Asked, Book
from agent.memory import facts, store
from feedback import conversations, episodes, users
from feedback.conversations import Place
from feedback.episodes import Recording
from feedback.exporting import Selection, export_file
from tests.integration.test_memory import USER, asked, remembering, talking


def answered(database, made, talk, parent, *, learn):
    """Write the answer to a prompt, as a turn does."""

    async def work():
        async with Book(database, learn_by_default=True).running() as book:
            begun = await book.begin(Asked(USER, "everloop", None, Place(talk.conversation, parent)))
            recording = Recording(
                episode_id=episodes.new_episode_id(),
                user_id=USER,
                release="base",
                adapter_digest=None,
                canary_id=None,
                arm="champion",
                propensity=1.0,
                messages=made.messages,
                sampling={},
                learn=learn,
                answer="Bread.",
                status="complete",
                finish_reason="stop",
                conversation_id=talk.conversation,
                parent_id=parent,
                context=made.record,
            )
            assert await book.end(recording, begun.key)

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.fixture
def remembered(database, base_model_dir):
    async def work(talk):
        return talk, await talk.say("Hello there.")

    talk, last = talking(database, work)
    with database.begin() as session:
        users.meet(session, USER)
        facts.add(session, USER, "I am allergic to walnuts.")
        kept = facts.add(session, USER, "My name is Bea.")
        facts.change(session, USER, kept.id, "My name is Beatrix.")
        assert store.pin(session, talk.conversation, last, pinned=True)
    made = remembering(database, base_model_dir).prompt(asked("What may I eat?", talk, last))
    assert "walnuts" in made.messages[0]["content"]
    return talk, last, made


@pytest.mark.parametrize("learn", [True, False])
def test_memories_are_exported_within_the_prompt_of_what_may_be_learned_from_and_nowhere_else(
    database, remembered, tmp_path, learn
):
    talk, last, made = remembered
    answered(database, made, talk, last, learn=learn)
    for number, (format_, all_signals) in enumerate(itertools.product(("jsonl", "parquet"), (True, False))):
        path = tmp_path / f"export-{number}.{format_}"
        export_file(database, path, format_, Selection(all_signals=all_signals))
        assert (b"walnuts" in path.read_bytes()) == learn
        assert (b"Beatrix" in path.read_bytes()) == learn


def test_a_person_reads_all_that_is_remembered_of_them_as_they_left_it(database, remembered):
    talk, last, _ = remembered
    with database() as session:
        found = {memory.text for memory in facts.of_user(session, USER)}
        assert found == {"I am allergic to walnuts.", "My name is Beatrix."}
        assert store.pinned(session, talk.conversation) == [last]
        assert conversations.get(session, talk.conversation, USER)
