"""The assistant through the official client, on a real engine."""

import json
import uuid
from contextlib import suppress

import openai
import pytest

from feedback.signals import KINDS, read_signal
from feedback.tables import Episode
from tests.conftest import wait_until


def episode(stack, episode_id):
    with stack.sessions() as session:
        return session.get(Episode, episode_id)


def test_an_answer_is_an_episode(stack):
    completion = stack.ask("What is the capital of France?", max_tokens=24, user="ada")
    row = episode(stack, completion.id)
    assert row.answer == completion.choices[0].message.content
    assert row.status == "complete" and row.user_id == "ada" and row.arm == "champion" and row.propensity == 1.0
    assert len(row.token_ids) == len(row.logprobs) == completion.usage.completion_tokens > 0
    assert all(value <= 0 for value in row.logprobs)
    assert completion.model == "base" and completion.usage.prompt_tokens == row.num_prompt_tokens > 0


def test_a_stream_is_the_same_episode_and_ends_with_usage(stack):
    chunks = list(stack.ask("Count to five.", stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert episode(stack, chunks[0].id).answer == text


def test_the_episode_is_there_before_the_client_sees_the_end(stack):
    for chunk in stack.ask(stream=True):
        if chunk.choices and chunk.choices[0].finish_reason:
            assert episode(stack, chunk.id).status == "complete"


def test_a_seed_makes_an_answer_repeatable(stack):
    first, second = (stack.ask(seed=7, temperature=1.0).choices[0].message.content for _ in range(2))
    assert first == second


def test_models_lists_the_assistant_and_the_releases(stack):
    assert {"everloop", "base"} <= {model.id for model in stack.openai.models.list()}


def test_a_release_can_be_asked_for_by_name(stack):
    completion = stack.ask(model="base")
    assert episode(stack, completion.id).arm == "pinned"


def test_hanging_up_in_mid_stream_leaves_an_interrupted_episode_and_stops_the_engine(stack):
    stream = stack.ask("Tell me a long story.", stream=True, max_tokens=1500)
    episode_id = next(iter(stream)).id
    for _ in range(3):
        next(iter(stream))
    stream.close()
    row = wait_until(lambda: episode(stack, episode_id), what="the interrupted episode was not written")
    assert row.status == "interrupted" and 0 < len(row.token_ids) < 1000
    wait_until(lambda: running_requests(stack) == 0, what="the engine goes on generating")


def test_hanging_up_without_a_stream_stops_the_engine_too(stack):
    with pytest.raises(openai.APITimeoutError):
        for n in range(5):  # now and then a story is short
            stack.ask(f"Tell me a long story, number {n}.", max_tokens=1500, user="impatient", timeout=2.0)

    def interrupted():
        with stack.sessions() as session:
            return session.query(Episode).filter_by(user_id="impatient", status="interrupted").first()

    wait_until(interrupted, what="the interrupted episode was not written")
    wait_until(lambda: running_requests(stack) == 0, what="the engine goes on generating")


def test_hanging_up_before_the_first_token_stops_the_engine_too(stack):
    def interrupted():
        prompt = " ".join(uuid.uuid4().hex[:5] for _ in range(250))  # not in the cache: seconds to read
        with suppress(openai.APITimeoutError):
            stack.ask(prompt, stream=True, user="more impatient", timeout=0.3)
        with stack.sessions() as session:
            return session.query(Episode).filter_by(user_id="more impatient", status="interrupted").first()

    row = wait_until(interrupted, what="the interrupted episode was not written")
    assert not row.token_ids and not row.answer
    wait_until(lambda: running_requests(stack) == 0, what="the engine goes on generating")


def running_requests(stack):
    import httpx

    metrics = httpx.get(
        f"{stack.settings.engine_url}/metrics", trust_env=False, headers=stack.settings.engine_credentials
    ).text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "nope"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, "invalid_request", "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "invalid_request", "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request", "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request", None),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, 400, "invalid_request", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, 413, "request_too_large", None),
        ({"max_tokens": 4000}, 400, "context_length_exceeded", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
        ({"temperature": float("nan")}, 400, "invalid_request", "temperature"),
        ({"temperature": 9}, 400, "invalid_request", "temperature"),
        ({"n": 99}, 400, "invalid_request", "n"),
        ({"tools": []}, 400, "invalid_request", "tools"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_with_a_stable_code_and_write_nothing(stack, body, status, code, param, stream):
    def count():
        with stack.sessions() as session:
            return session.query(Episode).filter_by(user_id="careless").count()

    before = count()
    base = {
        "model": "everloop",
        "messages": [{"role": "user", "content": "Hi"}],
        "user": "careless",
        "stream": stream,
    }
    # Not httpx's own JSON: it refuses to send NaN, which others do not.
    response = stack.http.post(
        "/v1/chat/completions", content=json.dumps({**base, **body}), headers={"Content-Type": "application/json"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert count() == before


@pytest.mark.parametrize("content", [b"{", b"", b'{"model": "everloop", "messages": ' + b"[" * 5000])
def test_invalid_json_is_refused(stack, content):
    response = stack.http.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == ("invalid_json" if content else "invalid_request")


def test_the_official_client_raises_its_own_errors(stack):
    with pytest.raises(openai.NotFoundError) as caught:
        stack.ask(model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_the_openapi_document_shows_examples(stack):
    document = stack.http.get("/openapi.json").json()
    assert "/v1/feedback" in document["paths"]
    body = document["paths"]["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    kinds = {name: ref.rpartition("/")[2] for name, ref in body["discriminator"]["mapping"].items()}
    assert set(kinds) == KINDS
    for kind, name in kinds.items():
        example = document["components"]["schemas"][name]["examples"][0]
        assert read_signal.validate_python(example).kind == kind
