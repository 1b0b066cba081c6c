"""Chat completions and completions as OpenAI's client asks for them, before an engine that says what it is told."""

import asyncio
import json

import openai
import pytest
import sqlalchemy as sa

from feedback.tables import Episode
from tests.scripted_engine import ScriptedEngine, api_on

HI = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def http(engine, database, tmp_path):
    with api_on(engine, database, tmp_path) as client:
        yield client


@pytest.fixture
def client(http):
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0, timeout=20)


def episodes(database):
    with database() as session:
        return session.scalars(sa.select(Episode).order_by(Episode.id)).all()


def ask(client, **options):
    return client.chat.completions.create(**{"model": "everloop", "messages": HI, "user": "ada", **options})


def test_parts_of_text_are_one_text_and_a_developer_is_the_system(client, engine, database):
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]
    ask(client, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert engine.asked[0]["messages"] == [{"role": "system", "content": "Be brief."}, HI[0]]
    assert episodes(database)[0].messages == engine.asked[0]["messages"]


def test_each_parameter_that_is_taken_reaches_the_engine(client, engine, database):
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    given = {"temperature": 0.3, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 5}
    ask(
        client,
        **given,
        stop=["\n"],
        logit_bias={"42": -5},
        max_completion_tokens=40,
        response_format=form,
        logprobs=True,
        top_logprobs=2,
        metadata={"project": "blue"},
        service_tier="auto",
        modalities=["text"],
        prompt_cache_key="k",
        safety_identifier="s",
        parallel_tool_calls=True,
    )
    asked = engine.asked[0]
    assert {name: asked[name] for name in given} == given
    assert (asked["stop"], asked["logit_bias"], asked["max_tokens"]) == (["\n"], {"42": -5}, 40)
    assert asked["response_format"]["json_schema"] == {"name": "colour", "schema": schema}
    assert asked["top_logprobs"] == 2
    (row,) = episodes(database)
    assert (
        row.request["metadata"] == {"project": "blue"} and row.request["response_format"]["type"] == "json_schema"
    )
    assert row.sampling["logit_bias"] == {"42": -5.0}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_told_of_every_token(client, stream):
    answer = ask(client, logprobs=True, top_logprobs=1, stream=stream)
    if stream:
        told = [e for c in answer for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    else:
        told = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in told) == "Blue is a colour."
    assert all(entry.logprob == -0.5 and entry.top_logprobs[0].token == "x" for entry in told)
    assert ask(client).choices[0].logprobs is None


def test_each_of_several_choices_is_an_episode_that_can_be_voted_on(client, engine, database, http):
    engine.script = lambda payload, _: f"Answer {payload['seed']}."
    answer = ask(client, n=3, seed=7)
    assert [c.message.content for c in answer.choices] == ["Answer 7.", "Answer 8.", "Answer 9."]
    ids = [choice.episode_id for choice in answer.choices]
    assert answer.id == ids[0] and len(set(ids)) == 3
    by_id = {row.id: row for row in episodes(database)}
    assert [by_id[each].answer for each in ids] == ["Answer 7.", "Answer 8.", "Answer 9."]
    assert {(row.release, row.arm, row.status) for row in by_id.values()} == {("base", "champion", "complete")}
    assert answer.usage.completion_tokens == 6 and answer.usage.prompt_tokens == 3
    vote = {"episode_id": ids[2], "user": "ada", "kind": "thumb", "value": 1, "idempotency_key": "k"}
    assert http.post("/v1/feedback", json=vote).status_code == 202


def test_several_choices_are_streamed_side_by_side(client, engine, database):
    engine.script = lambda payload, _: f"This is answer {payload['seed']}."
    said = {0: "", 1: "", 2: ""}
    named, reasons = {}, {}
    chunks = list(ask(client, n=3, seed=1, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            named[choice.index] = getattr(choice, "episode_id", chunk.id)
            reasons[choice.index] = choice.finish_reason
    assert said == {i: f"This is answer {i + 1}." for i in range(3)}
    assert reasons == dict.fromkeys(range(3), "stop") and chunks[-1].usage.completion_tokens == 12
    assert {row.id: row.answer for row in episodes(database)} == {named[i]: said[i] for i in range(3)}
    assert len({chunk.id for chunk in chunks}) == 1


def test_when_one_of_several_fails_the_client_is_told_and_all_are_episodes(client, engine, database):
    engine.breaks_after = 2
    with pytest.raises(openai.APIError, match="broke off"):
        list(ask(client, n=2, stream=True))
    rows = episodes(database)
    assert len(rows) == 2 and {row.status for row in rows} <= {"failed", "interrupted"}
    assert "failed" in {row.status for row in rows}


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_of_several_is_told_once_and_is_no_episode(client, engine, database, stream):
    engine.refuse = (400, "no")
    with pytest.raises(openai.BadRequestError):
        ask(client, n=3, stream=stream)
    assert episodes(database) == []


def test_hanging_up_on_several_choices_leaves_them_interrupted(client, engine, database):
    engine.script, engine.pause_s = lambda *_: "word " * 200, 0.02
    stream = ask(client, n=2, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if len(rows := episodes(database)) == 2:
            break
        import time

        time.sleep(0.05)
    assert {row.status for row in rows} == {"interrupted"}


def test_the_asynchronous_client_sees_the_same(http, engine):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
            given = {"model": "everloop", "messages": HI, "user": "ada"}
            whole = await client.chat.completions.create(**given)
            stream = await client.chat.completions.create(**given, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream]
            older = await client.completions.create(model="everloop", prompt="Blue is", user="ada")
            return whole.choices[0].message.content, "".join(pieces), older.choices[0].text

    assert asyncio.run(both()) == ("Blue is a colour.",) * 3


def test_a_text_is_gone_on_with_as_it_stands(client, engine, database):
    engine.script = lambda *_: "blue today."
    answer = client.completions.create(
        model="everloop", prompt=["The sky is "], echo=True, logprobs=1, max_tokens=5, user="ada", stop=["!"]
    )
    (choice,) = answer.choices
    assert choice.text == "The sky is blue today." and answer.object == "text_completion"
    assert choice.logprobs.tokens == ["blue", " today."] and choice.logprobs.text_offset == [11, 15]
    assert "messages" not in engine.asked[0] and engine.asked[0]["prompt"] == "The sky is "
    (row,) = episodes(database)
    assert row.id == answer.id and row.answer == "blue today." and row.learn is False
    assert row.request == {"api": "completions", "unstored": True} and row.num_prompt_tokens == 3


def test_completions_are_streamed(client, engine, database):
    chunks = list(
        client.completions.create(
            model="everloop", prompt="Sky:", echo=True, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    said = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert set(said.values()) == {"Sky:Blue is a colour."}
    assert chunks[-1].usage.total_tokens == 11 and len(episodes(database)) == 2


DEEP = {"type": "object"}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP}


def form(schema, name="x"):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
WRONG = [
    ({"n": 0}, "invalid_request", "n"),
    ({"n": 10**9}, "invalid_request", "n"),
    ({"n": "two"}, "invalid_request", "n"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "invalid_request", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_request", "logit_bias.5"),
    ({"logit_bias": {"blue": 1}}, "invalid_request", "logit_bias.blue.[key]"),
    ({"stop": list("abcde")}, "invalid_request", "stop"),
    ({"stop": [""]}, "invalid_request", "stop"),
    ({"top_logprobs": 3}, "invalid_request", "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "invalid_request", "top_logprobs"),
    ({"metadata": {str(i): "" for i in range(17)}}, "invalid_request", "metadata"),
    ({"metadata": {"k": "v" * 600}}, "invalid_request", "metadata.k"),
    ({"response_format": {"type": "yaml"}}, "invalid_request", "response_format"),
    ({"response_format": form({"type": "colour"})}, "invalid_request", "response_format"),
    ({"response_format": form({"$ref": "http://elsewhere/"})}, "invalid_request", "response_format"),
    ({"response_format": form({"type": "string", "pattern": "("})}, "invalid_request", "response_format"),
    ({"response_format": form(DEEP)}, "invalid_request", "response_format"),
    ({"response_format": form({"enum": ["x" * 40_000]})}, "invalid_request", "response_format"),
    ({"response_format": form({}, "no spaces")}, "invalid_request", "response_format"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "unsupported_parameter", "messages.0.content.type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_request", "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "invalid_request", "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "name": "ann"}]}, "unsupported_parameter", "messages.0.name"),
    ({"audio": {"voice": "alloy"}}, "unsupported_parameter", "audio"),
    ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    ({"service_tier": "flex"}, "unsupported_parameter", "service_tier"),
    (
        {"stream_options": {"include_obfuscation": True}},
        "unsupported_parameter",
        "stream_options.include_obfuscation",
    ),
    ({"best_of": 2}, "unknown_parameter", "best_of"),
    ({"prediction": {"type": "content", "content": "x"}}, "unsupported_parameter", "prediction"),
]


def refusals(http, path, sound, wrongs):
    """Return how each wrong body was refused, and how it should have been, where the two differ."""
    different = []
    for wrong, code, param in wrongs:
        content = json.dumps({**sound, **wrong})  # not httpx's own JSON, which refuses what others send
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
        error = answer.json().get("error", {})
        told = answer.status_code, error.get("code"), str(error.get("param")).split(".")[: len(param.split("."))]
        if told != (400, code, param.split(".")) or not error["message"]:
            different.append((str(wrong)[:80], error))
    return different


def test_what_is_wrong_is_refused_by_name_before_the_engine_is_asked(http, engine, database):
    assert refusals(http, "/v1/chat/completions", {"model": "everloop", "messages": HI}, WRONG) == []
    assert not engine.asked and not episodes(database)


OLDER = [
    ({"prompt": [1, 2, 999_999]}, "unsupported_parameter", "prompt"),
    ({"prompt": ["a", "b"]}, "unsupported_parameter", "prompt"),
    ({"prompt": ""}, "invalid_request", "prompt"),
    ({"suffix": "."}, "unsupported_parameter", "suffix"),
    ({"best_of": 3}, "unsupported_parameter", "best_of"),
    ({"logprobs": 6}, "invalid_request", "logprobs"),
    ({"max_tokens": 0}, "invalid_request", "max_tokens"),
    ({"tools": []}, "unknown_parameter", "tools"),
]


def test_completions_refuse_by_name(http, engine):
    assert refusals(http, "/v1/completions", {"model": "everloop", "prompt": "x"}, OLDER) == []
    assert not engine.asked


def test_null_is_as_if_not_given(http):
    body = {"model": "everloop", "messages": HI, "temperature": None, "tools": None, "n": None, "stop": None}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_what_the_engine_finds_wrong_is_told_as_such(http, engine):
    engine.refuse = (400, "token_id(s) [99999999] in logit_bias contain out-of-vocab token ids")
    body = {"model": "everloop", "messages": HI, "logit_bias": {"99999999": 1}}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "out-of-vocab" in answer.json()["error"]["message"]
