"""The official client over the whole surface, on the real engine: what is asked of it is what it does."""

import asyncio
import json
import math

import openai
import pytest

from feedback.tables import Episode
from tests.conftest import wait_until

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "maximum": 99_999_999},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(stack):
    """The client of somebody with a name, so that conversations are theirs."""
    return stack.openai.with_options(default_headers={"X-Everloop-User": "walker"})


def episode(stack, episode_id):
    with stack.sessions() as session:
        return session.get(Episode, episode_id)


def test_json_of_a_schema(stack):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    answer = stack.ask(
        "Name a city and its people, as JSON.", response_format=form, max_tokens=256, temperature=0.0
    )
    told = json.loads(answer.choices[0].message.content)
    assert set(told) == {"city", "people"} and isinstance(told["people"], int)


def test_any_json(stack):
    form = {"type": "json_object"}
    answer = stack.ask('Reply with {"ok": true}.', response_format=form, max_tokens=200, temperature=0.0, seed=1)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


def test_a_schema_that_the_engine_cannot_follow_is_refused(stack):
    """Or followed; but never an error of ours."""
    for schema in ({"type": "string", "pattern": "(?<=a)b"}, {"type": "object", "patternProperties": {"^a": {}}}):
        form = {"type": "json_schema", "json_schema": {"name": "odd", "schema": schema}}
        try:
            stack.ask(response_format=form)
        except openai.BadRequestError as error:
            assert error.code == "invalid_request"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_episode(stack, stream):
    answer = stack.ask(logprobs=True, top_logprobs=3, max_tokens=8, stream=stream)
    if stream:
        chunks = list(answer)
        episode_id = chunks[0].id
        told = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    else:
        episode_id, told = answer.id, answer.choices[0].logprobs.content
    row = episode(stack, episode_id)
    assert [entry.logprob for entry in told] == pytest.approx(row.logprobs)
    assert all(len(entry.top_logprobs) == 3 and entry.bytes for entry in told)


def test_a_token_can_be_ruled_out(stack):
    usual = stack.ask(temperature=0.0, logprobs=True, max_tokens=4)
    first = episode(stack, usual.id).token_ids[0]
    other = stack.ask(temperature=0.0, logit_bias={str(first): -100}, max_tokens=4)
    assert episode(stack, other.id).token_ids[0] != first
    with pytest.raises(openai.BadRequestError) as caught:
        stack.ask(logit_bias={"999999999": 1})
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_differ_and_are_episodes(stack, stream):
    asked = {"n": 3, "temperature": 1.5, "seed": 3, "max_tokens": 12, "stream": stream}
    answer = stack.ask("Invent a name.", **asked)
    said, ids = {}, {}
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            text = choice.delta.content if stream else choice.message.content
            said[choice.index] = said.get(choice.index, "") + (text or "")
            ids[choice.index] = getattr(choice, "episode_id", chunk.id)
    rows = {index: wait_until(lambda each=each: episode(stack, each)) for index, each in ids.items()}
    assert len(rows) == 3 and len(set(said.values())) > 1
    assert {index: row.answer for index, row in rows.items()} == said
    again = stack.ask("Invent a name.", **{**asked, "stream": False})
    # What else is in the batch may move a logit: one of three is enough to see that the seed is heeded.
    assert any(choice.message.content == said[choice.index] for choice in again.choices)


def test_a_stop_text_ends_the_answer(stack):
    answer = stack.ask("Count: 1, 2, 3, 4, 5, 6", stop=["3"], max_tokens=40, temperature=0.0)
    assert "3" not in answer.choices[0].message.content


def test_completions(stack, client):
    whole = client.completions.create(
        model="everloop", prompt="The capital of France is", max_tokens=6, temperature=0.0, logprobs=2, echo=True
    )
    (choice,) = whole.choices
    assert "Paris" in choice.text and choice.text.startswith("The capital of France is")
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == whole.usage.completion_tokens
    assert all(math.isfinite(value) for value in choice.logprobs.token_logprobs)
    row = episode(stack, whole.id)
    assert row.learn is False and row.num_prompt_tokens == whole.usage.prompt_tokens > 0
    pieces = client.completions.create(
        model="everloop", prompt="The capital of France is", max_tokens=6, temperature=0.0, stream=True
    )
    assert "".join(c.choices[0].text for c in pieces if c.choices) == choice.text.removeprefix(
        "The capital of France is"
    )


def test_responses_in_a_conversation(stack, client):
    conversation = client.conversations.create(metadata={"topic": "colours"})
    first = client.responses.create(
        model="everloop", conversation=conversation.id, input="My name is Bartholomew.", max_output_tokens=12
    )
    with client.responses.stream(
        model="everloop", conversation=conversation.id, input="What is my name?", max_output_tokens=12
    ) as stream:
        kinds = [event.type for event in stream]
        second = stream.get_final_response() if kinds[-1] == "response.completed" else None
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    texts = [item.content[0].text for item in client.conversations.items.list(conversation.id, order="asc")]
    assert texts[:3] == ["My name is Bartholomew.", first.output_text, "What is my name?"] and len(texts) == 4
    if second is not None:
        assert client.responses.retrieve(second.id).output_text == second.output_text
    receipt = stack.http.post(
        "/v1/feedback",
        json={"episode_id": first.id, "kind": "thumb", "value": 1, "user": "walker", "idempotency_key": "walk"},
    )
    assert receipt.status_code == 202
    assert client.conversations.delete(conversation.id).deleted


def test_responses_in_a_form(client):
    text = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    made = client.responses.create(
        model="everloop", input="Name a city and its people.", text=text, temperature=0.0, max_output_tokens=256
    )
    assert set(json.loads(made.output_text)) == {"city", "people"}


def test_the_asynchronous_client(stack):
    async def ask():
        async with openai.AsyncOpenAI(
            base_url=stack.openai.base_url, api_key=stack.openai.api_key, max_retries=0, timeout=60
        ) as client:
            messages = [{"role": "user", "content": "Name a colour."}]
            given = {"model": "everloop", "temperature": 0.0, "user": "walker"}
            whole = await client.chat.completions.create(**given, messages=messages, max_tokens=8)
            stream = await client.chat.completions.create(**given, messages=messages, max_tokens=8, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream]
            response = await client.responses.create(**given, input="Name a colour.", max_output_tokens=8)
            return whole.choices[0].message.content, "".join(pieces), response.output_text

    said = asyncio.run(ask())
    assert len(set(said)) == 1 and said[0]


def test_requests_are_told_apart_by_their_headers(stack):
    raw = stack.openai.chat.completions.with_raw_response.create(
        model="everloop", messages=[{"role": "user", "content": "Hi"}], user="walker", max_tokens=2
    )
    assert raw.headers["x-request-id"].startswith("req_") and int(raw.headers["openai-processing-ms"]) > 0
    assert raw.request_id == raw.headers["x-request-id"]
