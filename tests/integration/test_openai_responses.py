"""Responses and conversations as OpenAI's client asks for them, before an engine that says what it is told."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import sqlalchemy as sa
from openai.types.conversations import Conversation as OpenAIConversation
from openai.types.conversations import ConversationItemList
from openai.types.responses import Response, ResponseItemList

from feedback import erasure
from feedback.tables import ConversationItem, Episode
from tests.scripted_engine import ScriptedEngine, api_on


def echo(payload, choice):
    return f"You said: {payload['messages'][-1]['content']}"


@pytest.fixture
def engine():
    return ScriptedEngine(echo)


@pytest.fixture
def http(engine, database, tmp_path):
    with api_on(engine, database, tmp_path) as client:
        client.headers["X-Everloop-User"] = "ada"
        yield client


@pytest.fixture
def client(http):
    headers = {"X-Everloop-User": "ada"}
    url = f"{http.base_url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20, default_headers=headers)


def episodes(database):
    with database() as session:
        return session.scalars(sa.select(Episode).order_by(Episode.id)).all()


def said(engine, number=-1):
    return [(message["role"], message["content"]) for message in engine.asked[number]["messages"]]


def test_a_response_is_an_episode_and_can_be_asked_for_again(client, http, engine, database):
    made = client.responses.create(
        model="everloop", input="Blue.", instructions="Echo.", metadata={"k": "v"}, temperature=0.5, top_p=0.9
    )
    Response.model_validate(made.model_dump(), strict=True)
    assert made.output_text == "You said: Blue." and made.status == "completed"
    assert made.usage.output_tokens == 3 and made.usage.input_tokens == 3
    assert said(engine) == [("system", "Echo."), ("user", "Blue.")]
    (row,) = episodes(database)
    assert (row.id, row.user_id, row.learn) == (made.id, "ada", True)
    assert client.responses.retrieve(made.id).model_dump() == made.model_dump()
    vote = {"episode_id": made.id, "kind": "thumb", "value": 1, "idempotency_key": "k", "user": "ada"}
    assert http.post("/v1/feedback", json=vote).status_code == 202
    stranger = http.get(f"/v1/responses/{made.id}", headers={"X-Everloop-User": "ben"})
    assert stranger.status_code == 404 and stranger.json()["error"]["code"] == "response_not_found"


def test_a_stream_has_the_events_of_openais(client, database):
    with client.responses.stream(model="everloop", input="Red.") as stream:
        seen = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in seen]
    deltas = [event.delta for event in seen if event.type == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4:-4] == ["response.output_text.delta"] * len(deltas)
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(deltas) == final.output_text == episodes(database)[0].answer == "You said: Red."
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_what_was_cut_is_incomplete_and_what_broke_off_has_failed(client, engine, database):
    cut = client.responses.create(model="everloop", input="One two.", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    engine.breaks_after = 1
    events = list(client.responses.create(model="everloop", input="Red.", stream=True))
    assert events[-1].type == "response.failed" and "engine_failed" in events[-1].response.error.message
    assert client.responses.retrieve(events[0].response.id).status == "failed"


def test_one_goes_on_from_another_whose_instructions_are_not_its_own(client, engine, database):
    first = client.responses.create(model="everloop", input="One.", instructions="Echo.")
    second = client.responses.create(
        model="everloop",
        previous_response_id=first.id,
        instructions="Shout.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Two."}]}],
    )
    third = client.responses.create(model="everloop", previous_response_id=second.id, input="Three.")
    assert said(engine) == [
        ("user", "One."),
        ("assistant", "You said: One."),
        ("user", "Two."),
        ("assistant", "You said: Two."),
        ("user", "Three."),
    ]
    assert third.previous_response_id == second.id and third.instructions is None
    listed = client.responses.input_items.list(third.id)
    assert [item.content[0].text for item in listed] == ["Three."]
    ResponseItemList.model_validate(client.responses.input_items.list(first.id).to_dict() | {"object": "list"})


def test_a_chat_can_be_gone_on_from(client, engine):
    messages = [{"role": "system", "content": "Echo."}, {"role": "user", "content": "One."}]
    chat = client.chat.completions.create(model="everloop", messages=messages, user="ada")
    client.responses.create(model="everloop", previous_response_id=chat.id, input="Two.")
    assert said(engine)[0] == ("system", "Echo.") and said(engine)[-2:] == [
        ("assistant", "You said: One."),
        ("user", "Two."),
    ]


def test_json_of_a_schema_and_log_probabilities(client, engine):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    made = client.responses.create(
        model="everloop", input="x", text=text, include=["message.output_text.logprobs"], top_logprobs=1
    )
    assert engine.asked[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": schema},
    }
    assert made.text.format.name == "a" and len(made.output[0].content[0].logprobs) == 3


def test_a_response_is_deleted_with_what_was_said_of_it(client, http, database):
    first = client.responses.create(model="everloop", input="My name is Zebedee.")
    vote = {"episode_id": first.id, "kind": "comment", "text": "thanks", "idempotency_key": "k", "user": "ada"}
    assert http.post("/v1/feedback", json=vote).status_code == 202
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="everloop", input="x", previous_response_id=first.id)
    (row,) = episodes(database)
    assert (row.messages, row.answer, row.request, row.learn) == ([], "", None, False)


def test_what_is_not_stored_cannot_be_asked_for_again_and_is_not_learned_from(client, database):
    made = client.responses.create(model="everloop", input="x", store=False)
    assert made.store is False and episodes(database)[0].learn is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_conversations_and_their_items(client, engine, database):
    made = client.conversations.create(
        metadata={"topic": "colours"}, items=[{"role": "developer", "content": "Echo."}]
    )
    OpenAIConversation.model_validate(made.model_dump(), strict=True)
    put = client.conversations.items.create(made.id, items=[{"role": "user", "content": "Before."}])
    first = client.responses.create(model="everloop", conversation=made.id, input="One.")
    client.responses.create(model="everloop", conversation={"id": made.id}, input="Two.")
    assert said(engine) == [
        ("system", "Echo."),
        ("user", "Before."),
        ("user", "One."),
        ("assistant", "You said: One."),
        ("user", "Two."),
    ]
    items = list(client.conversations.items.list(made.id, limit=2, order="asc"))  # pages by itself
    texts = [item.content[0].text for item in items]
    assert texts == ["Echo.", "Before.", "One.", "You said: One.", "Two.", "You said: Two."]
    back = list(client.conversations.items.list(made.id, limit=3))
    assert [item.id for item in back] == [item.id for item in reversed(items)]
    for item in items:
        assert client.conversations.items.retrieve(item.id, conversation_id=made.id).content[0].text
    with pytest.raises(openai.ConflictError, match="DELETE /v1/responses"):
        client.conversations.items.delete(items[-1].id, conversation_id=made.id)
    client.conversations.items.delete(put.data[0].id, conversation_id=made.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(put.data[0].id, conversation_id=made.id)
    assert client.conversations.update(made.id, metadata={"topic": "none"}).metadata == {"topic": "none"}
    assert client.conversations.retrieve(made.id).metadata == {"topic": "none"}
    raw = client.conversations.items.with_raw_response.list(made.id).http_response.json()
    ConversationItemList.model_validate(raw)
    # What follows a turn of a conversation is one of it, too.
    again = client.responses.create(model="everloop", previous_response_id=first.id, input="Other.")
    assert again.conversation.id == made.id
    assert client.conversations.delete(made.id).deleted
    assert all(not row.messages for row in episodes(database))
    with database() as session:
        assert not session.scalars(sa.select(ConversationItem)).all()


def test_the_page_sees_the_same_turns(client, http):
    made = client.conversations.create()
    client.responses.create(model="everloop", conversation=made.id, input="One.")
    client.responses.create(model="everloop", conversation=made.id, input="Two.")
    turns = http.get(f"/v1/conversations/{made.id}/turns").json()["data"]
    assert [turn["question"] for turn in turns] == ["Two.", "One."] and turns[0]["parent_id"] == turns[1]["id"]
    assert http.get("/v1/conversations").json()["data"][0]["title"] == "One."


def test_two_who_write_in_one_conversation_at_once_are_both_kept(client, database):
    made = client.conversations.create()
    client.responses.create(model="everloop", conversation=made.id, input="First.")

    def write(number):
        return client.responses.create(model="everloop", conversation=made.id, input=f"Number {number}.").id

    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(write, range(4)))
    rows = episodes(database)
    assert len(rows) == 5 and ids <= {row.id for row in rows}
    texts = {item.content[0].text for item in client.conversations.items.list(made.id, limit=100)}
    assert {f"You said: Number {n}." for n in range(4)} <= texts


def test_who_is_forgotten_leaves_no_words(client, database):
    made = client.conversations.create(
        items=[{"role": "user", "content": "My name is Zebedee."}], metadata={"n": "Zebedee"}
    )
    client.responses.create(
        model="everloop", conversation=made.id, input="Zebedee again.", metadata={"n": "Zebedee"}
    )
    with database.begin() as session:
        erasure.forget(session, "ada", "retrain-required")
    with database() as session:
        assert not session.scalars(sa.select(ConversationItem)).all()
        row = session.scalars(sa.select(Episode)).one()
    assert "Zebedee" not in str([row.messages, row.answer, row.request, row.sampling, row.user_id])


def test_the_asynchronous_client_sees_the_same(http):
    async def ask():
        headers = {"X-Everloop-User": "ada"}
        async with openai.AsyncOpenAI(
            base_url=f"{http.base_url}/v1", api_key="none", max_retries=0, default_headers=headers
        ) as client:
            whole = await client.responses.create(model="everloop", input="x")
            stream = await client.responses.create(model="everloop", input="x", stream=True)
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return whole.output_text, "".join(pieces), (await client.responses.retrieve(whole.id)).output_text

    assert asyncio.run(ask()) == ("You said: x",) * 3


WRONG = [
    ({"input": []}, "invalid_request", "input"),
    ({"input": 5}, "invalid_request", "input"),
    ({"input": ""}, "invalid_request", "input"),
    ({"input": [{"role": "assistant", "content": "x"}]}, "invalid_request", "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_parameter", "input.0"),
    ({"previous_response_id": "ep_none"}, "previous_response_not_found", "previous_response_id"),
    ({"conversation": "cv_none"}, "conversation_not_found", "conversation"),
    ({"conversation": "cv_x", "previous_response_id": "ep_x"}, "two_places", "previous_response_id"),
    ({"background": True}, "unsupported_parameter", "background"),
    ({"truncation": "perhaps"}, "invalid_request", "truncation"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
    ({"include": ["reasoning.encrypted_content"]}, "invalid_request", "include"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "invalid_request", "text"),
    ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
    ({"max_output_tokens": 0}, "invalid_request", "max_output_tokens"),
    ({"n": 2}, "unknown_parameter", "n"),
]


def test_what_is_wrong_is_refused_by_name(http, engine, database):
    different = []
    for wrong, code, param in WRONG:
        answer = http.post("/v1/responses", json={"model": "everloop", "input": "x", **wrong})
        error = answer.json()["error"]
        if (
            error["code"] != code
            or not str(error["param"]).startswith(param)
            or answer.status_code not in (400, 404)
        ):
            different.append((wrong, answer.status_code, error))
    assert different == [] and not engine.asked and not episodes(database)
    made = http.post("/v1/responses", json={"model": "everloop", "input": "x"}).json()
    assert http.post(f"/v1/responses/{made['id']}/cancel").json()["error"]["code"] == "not_in_background"
    assert http.get(f"/v1/responses/{made['id']}?stream=true").json()["error"]["code"] == "unsupported_parameter"
