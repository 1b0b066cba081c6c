"""Memory on the real engine: tokens are counted as it counts them, and what was said is there."""

import json
import uuid

import pytest
import sqlalchemy as sa

from agent.memory.counting import Counter
from agent.tables import MemoryVote
from feedback.tables import Episode
from tests.conftest import wait_until
from tests.unit.test_memory_context import NASTY


@pytest.fixture(scope="module")
def counter(stack):
    return Counter(stack.settings.base_model_dir)


@pytest.fixture
def talk(stack):
    """A conversation of somebody new; returns a function that asks there."""
    user = f"ada-{uuid.uuid4().hex[:8]}"
    headers = {"X-Everloop-User": user}
    conversation = stack.http.post("/v1/conversations", json={}, headers=headers).json()["id"]

    def say(text, parent=None, **fields):
        body = {"model": "everloop", "user": user, "max_tokens": 8, "conversation": conversation, "temperature": 0}
        body |= {
            "messages": [{"role": "user", "content": text}],
            **({"parent": parent} if parent else {}),
            **fields,
        }
        return stack.http.post("/v1/chat/completions", json=body)

    say.headers, say.conversation, say.user = headers, conversation, user
    return say


@pytest.mark.parametrize("number", range(len(NASTY)))
def test_tokens_are_those_that_the_engine_counts(stack, counter, number):
    messages = [
        {"role": "user", "content": f"Hello{NASTY[number]}"},
        {"role": "assistant", "content": f"{NASTY[number - 1]} and"},
        {"role": "user", "content": NASTY[number]},
    ]
    answer = stack.openai.chat.completions.create(model="everloop", user="t", messages=messages, max_tokens=1)
    assert counter.prompt(messages) == answer.usage.prompt_tokens


def test_only_the_question_is_sent_and_the_past_is_there(stack, talk):
    first = talk("Remember that the gate code is 4471.").json()["id"]
    answer = talk("Say hello.", parent=first)
    told = json.loads(answer.headers["X-Everloop-Memory"])
    assert told == {"kept": 2, "earlier": 2, "memories": 1}
    shown = stack.http.get(f"/v1/episodes/{answer.json()['id']}", headers=talk.headers).json()
    assert [message["role"] for message in shown["messages"]] == ["system", "user", "assistant", "user"]
    assert "the gate code is 4471" in shown["messages"][0]["content"]
    assert shown["messages"][1]["content"] == "Remember that the gate code is 4471."
    assert answer.json()["usage"]["prompt_tokens"] == shown["context"]["used"] <= shown["context"]["budget"]
    (row, _) = stack.http.get(f"/v1/conversations/{talk.conversation}/turns", headers=talk.headers).json()["data"]
    assert row["used"] == told


def test_memories_are_their_persons_to_see_and_to_change(stack, talk):
    talk("My name is Ada and I like tea.")
    (memory,) = stack.http.get("/v1/memories", headers=talk.headers).json()["data"]
    assert memory["text"] == "My name is Ada and I like tea" and memory["conversation_id"] == talk.conversation
    path = f"/v1/memories/{memory['id']}"
    assert stack.http.get("/v1/memories", headers={"X-Everloop-User": "eve"}).json()["data"] == []
    assert stack.http.delete(path, headers={"X-Everloop-User": "eve"}).status_code == 404
    assert (
        stack.http.patch(path, json={"text": "My name is Eve"}, headers=talk.headers).json()["text"]
        == "My name is Eve"
    )
    added = stack.http.post("/v1/memories", json={"text": "Call me Bob."}, headers=talk.headers).json()
    assert added["id"] == memory["id"], "there is one name"
    assert stack.http.put("/v1/memories/choice", json={"remember": False}, headers=talk.headers).status_code == 200
    talk("I live in Oslo.")
    left = stack.http.get("/v1/memories", headers=talk.headers).json()
    assert [each["text"] for each in left["data"]] == ["Call me Bob."] and left["remember"] is False
    assert stack.http.delete(path, headers=talk.headers).json()["deleted"]
    assert stack.http.get("/v1/memories", headers=talk.headers).json()["data"] == []


def test_pins_are_of_ones_own_turns(stack, talk):
    turn = talk("Hello.").json()["id"]
    path = f"/v1/conversations/{talk.conversation}/turns/{turn}/pin"
    assert stack.http.post(path, json={"pinned": True}, headers={"X-Everloop-User": "eve"}).status_code == 404
    assert stack.http.post(path, json={"pinned": True}, headers=talk.headers).json() == {"pinned": True}
    pins = stack.http.get(f"/v1/conversations/{talk.conversation}/pins", headers=talk.headers).json()
    assert pins == {"data": [turn]}
    assert stack.http.post(path, json={"pinned": False}, headers=talk.headers).status_code == 200


def test_a_message_that_is_too_long_is_refused_with_its_size_or_cut_where_asked(stack, talk):
    long = "word " * 3000
    refused = talk(long)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert "30" in refused.json()["error"]["message"]
    cut = talk(long, truncation="auto")
    assert cut.status_code == 200 and cut.json()["usage"]["prompt_tokens"] < 2048


def test_a_long_talk_stays_within_the_context_and_a_thumb_moves_the_weights_once(stack, talk):
    parent = None
    for number in range(14):
        text = f"Station {number}. " + f"It is on line {number} and has many trains, people and shops. " * 14
        answer = talk(text, parent)
        assert answer.status_code == 200, answer.text
        parent = answer.json()["id"]
    told = json.loads(answer.headers["X-Everloop-Memory"])
    assert 0 < told["kept"] <= told["earlier"] == 26
    with stack.sessions() as session:
        context = session.scalar(sa.select(Episode.context).where(Episode.id == parent))
    assert context["used"] <= context["budget"] and context["drawn"] and context["chunks"][0]["features"]
    for _ in range(2):
        thumb = stack.feedback(parent, kind="thumb", value=1, user=talk.user)
        assert thumb.status_code == 202

    def votes():
        with stack.sessions() as session:
            return session.scalars(sa.select(MemoryVote.value).where(MemoryVote.episode_id == parent)).all()

    assert wait_until(votes, 30, "the thumb reached the weights") == [1]
