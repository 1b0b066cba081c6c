"""Answers that are stored, and models, as OpenAI's client asks for them; and answers in the form of a class."""

import json

import openai
import pytest
from pydantic import BaseModel

from feedback.tables import Episode
from tests.scripted_engine import ScriptedEngine, api_on


class City(BaseModel):
    name: str
    people: int | None = None


@pytest.fixture
def engine():
    return ScriptedEngine(lambda payload, choice: f"You said: {payload['messages'][-1]['content']}")


@pytest.fixture
def http(engine, database, tmp_path):
    with api_on(engine, database, tmp_path) as client:
        yield client


@pytest.fixture
def client(http):
    headers = {"X-Everloop-User": "ada"}
    url = f"{http.base_url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20, default_headers=headers)


def ask(client, text, **options):
    messages = [{"role": "system", "content": "Echo."}, {"role": "user", "content": text}]
    return client.chat.completions.create(model="everloop", messages=messages, **options)


def test_answers_are_listed_returned_described_and_deleted(client, http, database):
    made = [ask(client, f"Number {n}.", metadata={"n": str(n % 2)}) for n in range(5)]
    ask(client, "Not kept.", store=False)
    ask(client, "Somebody else's.", user="ben")
    assert [each.id for each in client.chat.completions.list(limit=2)] == [each.id for each in made]  # all pages
    newest = client.chat.completions.list(order="desc", limit=1)
    assert newest.data[0].id == made[-1].id and newest.has_more
    odd = [each.id for each in client.chat.completions.list(metadata={"n": "1"})]
    assert odd == [made[1].id, made[3].id]
    assert client.chat.completions.retrieve(made[0].id).choices[0].message.content == "You said: Number 0."
    shown = [(each.role, each.content) for each in client.chat.completions.messages.list(made[0].id, limit=1)]
    assert shown == [("system", "Echo."), ("user", "Number 0.")]
    assert client.chat.completions.update(made[0].id, metadata={"n": "7"}).to_dict()["metadata"] == {"n": "7"}
    assert [each.id for each in client.chat.completions.list(metadata={"n": "7"})] == [made[0].id]
    assert client.chat.completions.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(made[0].id)
    other = http.get(f"/v1/chat/completions/{made[1].id}", headers={"X-Everloop-User": "ben"})
    assert other.status_code == 404 and other.json()["error"]["code"] == "completion_not_found"
    with database() as session:
        row = session.get(Episode, made[0].id)
        assert (row.messages, row.answer, row.request) == ([], "", None)


def test_models_are_returned_one_by_one(client):
    assert client.models.retrieve("everloop").owned_by == "everloop"
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("run/none@latest")
    assert caught.value.code == "model_not_found"


def test_answers_in_the_form_of_a_class(client, engine):
    engine.script = lambda payload, choice: json.dumps({"name": "Rome", "people": 2_800_000})
    messages = [{"role": "user", "content": "Name a city."}]
    parsed = client.chat.completions.parse(model="everloop", messages=messages, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Rome", people=2_800_000)
    assert (
        client.responses.parse(model="everloop", input="Name a city.", text_format=City).output_parsed.name
        == "Rome"
    )
    assert {asked["response_format"]["json_schema"]["name"] for asked in engine.asked} == {"City"}
