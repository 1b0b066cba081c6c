"""What somebody said is told apart from what Everloop added to it, whichever way it is read again."""

import openai
import pytest
import sqlalchemy as sa

from feedback import users
from feedback.tables import Episode
from tests.scripted_engine import ScriptedEngine, api_on

NO_TOOLS = {"server_tools": []}  # which would be told of in this request, too


@pytest.fixture
def engine():
    return ScriptedEngine(lambda payload, choice: f"You said: {payload['messages'][-1]['content']}")


@pytest.fixture
def http(engine, database, tmp_path):
    with api_on(engine, database, tmp_path, offer_tools=True, max_model_tokens=4096) as client:
        client.headers["X-Everloop-User"] = "ada"
        yield client


@pytest.fixture
def client(http):
    headers = {"X-Everloop-User": "ada"}
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0, default_headers=headers)


def shown(engine, number=-1):
    return [(message["role"], message["content"]) for message in engine.asked[number]["messages"]]


def chat(http, *messages, **body):
    said = [{"role": role, "content": content} for role, content in messages]
    answer = http.post("/v1/chat/completions", json={"model": "everloop", "user": "ada", "messages": said, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_response_after_a_chats_first_turn_has_none_of_everloops_own_words_in_it(http, client, engine):
    assert http.post("/v1/memories", json={"text": "I keep seven herons."}).status_code in (200, 201)
    talk = http.post("/v1/conversations", json={}).json()["id"]
    first = chat(http, ("user", "One."), conversation=talk)
    told = shown(engine)[0]
    assert told[0] == "system" and "herons" in told[1] and "<tools>" in told[1]
    for place in ({"previous_response_id": first["id"]}, {"conversation": talk}):
        client.responses.create(model="everloop", input="Two.", extra_body=NO_TOOLS, **place)
        assert shown(engine)[:3] == [("user", "One."), ("assistant", "You said: One."), ("user", "Two.")]


def test_a_system_message_of_the_clients_is_carried_as_it_was_sent(http, client, engine, database):
    first = chat(http, ("system", "Echo."), ("user", "One."))
    assert "<tools>" in shown(engine)[0][1]
    client.responses.create(model="everloop", input="Two.", previous_response_id=first["id"], extra_body=NO_TOOLS)
    assert shown(engine)[:2] == [("system", "Echo."), ("user", "One.")]
    listed = client.responses.input_items.list(first["id"], order="asc")
    assert [(item.role, item.content[0].text) for item in listed] == [("system", "Echo."), ("user", "One.")]
    with database.begin() as session:
        users.meet(session, "ada")
    assert client.responses.delete(first["id"]) is None
    with database() as session:
        assert session.scalars(sa.select(Episode.request).where(Episode.id == first["id"])).all() == [None]


def test_a_past_that_was_cut_to_fit_is_carried_whole(http, client, engine):
    past = [("user" if n % 2 == 0 else "assistant", f"Line {n}: " + "reeds " * 200) for n in range(20)]
    first = chat(http, *past, ("user", "Last."))
    assert len(str(shown(engine))) < len(str(past)) / 2
    listed = list(client.responses.input_items.list(first["id"], order="asc", limit=100))
    assert [item.content[0].text for item in listed] == [text for _, text in [*past, ("user", "Last.")]]
