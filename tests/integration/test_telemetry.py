"""What parts tell of themselves: one vote's trace from HTTP to its effects, and metrics of what happened."""

import json
import re
import time
import uuid

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows.bench.stack import ADDRESSES, log_stack, write_episode
from tests.conftest import wait_until
from tests.otlp import Collector

TRACE = "0af7651916cd43dd8448eb211c80319c"
WORDS = "marmalade"


@pytest.fixture(scope="module")
def traced(home, base_model_dir):
    """The log's parts, without the engine, with a collector of traces and JSON logs."""
    with pytest.MonkeyPatch.context() as patch, Collector() as collector:
        patch.setenv("EVERLOOP_HOME", str(home))
        patch.setenv("EVERLOOP_OTLP_URL", collector.url)
        patch.setenv("EVERLOOP_LOG_FORMAT", "json")
        for name in ADDRESSES:
            patch.delenv(f"EVERLOOP_{name}", raising=False)
        with log_stack() as (settings, sessions, _):
            yield settings, sessions, collector


@pytest.fixture(scope="module")
def vote(traced):
    """A thumb that was given within a trace, and learned."""
    settings, sessions, _ = traced
    with sessions.begin() as session:
        episode_id = write_episode(session, "ada", 1, f"A number is like {WORDS}.")
    signal = {"episode_id": episode_id, "user": "ada", "kind": "thumb", "value": 1, "idempotency_key": "k1"}
    url = f"{settings.need('public_url')}/v1/feedback"
    headers = {"X-Everloop-User": "ada", **settings.credentials}
    caller = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    given = httpx.post(url, json=signal, headers=headers | caller, trust_env=False)
    assert given.status_code == 202, given.text
    feedback_id = given.json()["id"]
    receipt = f"{url}/{feedback_id}/receipt"

    def learned():
        found = httpx.get(receipt, headers=headers, trust_env=False).json()
        return found if found.get("p_after") is not None or "moved the belief" in found.get("summary", "") else None

    wait_until(learned, timeout_s=120, what="the vote was not learned")
    return feedback_id, episode_id


def test_one_votes_trace_spans_http_relay_and_reward_update(traced, vote):
    _, _, collector = traced
    feedback_id, episode_id = vote
    wanted = {
        "http": ("everloop-api", "POST /v1/feedback"),
        "relay": ("everloop-relay", "publish everloop.feedback"),
        "reward": ("everloop-reward", "reward feedback.given"),
        "report": ("everloop-relay", "publish everloop.rewards"),
        "receipt": ("everloop-ledger", "receipts reward.updated"),
    }
    # Each part sends its own once a second.
    wait_until(lambda: set(wanted.values()) <= collector.of(TRACE).keys(), what="spans are missing")
    spans = {hop: collector.of(TRACE)[name] for hop, name in wanted.items()}
    assert spans["http"].parent_id == "b7ad6b7169203331", "the caller's trace goes on"
    for before, after in zip(wanted, list(wanted)[1:], strict=False):
        assert spans[after].parent_id == spans[before].span_id, f"{after} follows from {before}"
    assert spans["http"].attributes["http.route"] == "/v1/feedback"
    assert spans["http"].attributes["http.response.status_code"] == 202
    assert spans["reward"].attributes["everloop.feedback_id"] == feedback_id
    assert spans["reward"].attributes["everloop.episode_id"] == episode_id
    assert not any(span.is_error for span in spans.values())


def test_no_span_holds_what_people_said_or_who_they_are(traced, vote):
    _, _, collector = traced
    for span in collector.spans:
        assert WORDS not in str(span) and "ada" not in span.attributes.values()


def test_each_part_serves_metrics_where_the_targets_say(traced, vote):
    settings, _, _ = traced
    parts = {target["labels"]["part"] for target in targets(settings)}
    assert parts == {"api", "relay", "ledger", "reward"}
    for part in parts:
        assert figures(settings, part)["process_resident_memory_bytes"][()] > 10e6, part


def test_metrics_say_what_became_of_the_vote(traced, vote):
    settings, _, _ = traced
    api = figures(settings, "api")
    given = ("method", "POST"), ("route", "/v1/feedback"), ("status", "2xx")
    assert api["everloop_http_requests_total"][given] >= 1
    assert api["everloop_http_request_duration_seconds_count"][given[:2]] >= 1
    assert figures(settings, "relay")["everloop_relay_published_events_total"][("topic", "everloop.feedback"),] >= 1
    learned = ("consumer", "reward"), ("type", "feedback.given")
    reward = figures(settings, "reward")
    assert reward["everloop_consumer_events_total"][learned] >= 1
    assert reward["everloop_reward_updates_total"][()] >= 1
    ledger = figures(settings, "ledger")
    assert ledger["everloop_consumer_events_total"][("consumer", "receipts"), ("type", "reward.updated")] >= 1
    assert ledger["everloop_home_free_bytes"][()] > 0 and ledger["everloop_canary_open"][()] == 0


def test_from_a_vote_to_its_effect_takes_a_second(traced, vote):
    """The figure of the front page, as the metric tells it; generous, as machines of tests are noisy."""
    settings, sessions, _ = traced
    with sessions.begin() as session:
        episode_id = write_episode(session, "bo", 2, "A number.")
    key = ("consumer", "reward"), ("type", "feedback.given")

    def seen():
        reward = figures(settings, "reward")
        name = "everloop_consumer_event_to_effect_seconds"
        return reward[f"{name}_count"][key], reward[f"{name}_sum"][key]

    time.sleep(2)  # its features are there when it is voted on
    before = seen()
    for number in range(5):
        signal = {"episode_id": episode_id, "user": "bo", "kind": "thumb", "value": (-1) ** number}
        body = {**signal, "idempotency_key": uuid.uuid4().hex}
        url = f"{settings.public_url}/v1/feedback"
        httpx.post(url, json=body, headers=settings.credentials, trust_env=False).raise_for_status()
        wait_until(lambda n=number: seen()[0] == before[0] + n + 1)
    mean_s = (seen()[1] - before[1]) / 5
    assert 0 < mean_s < 2.0, mean_s


def test_routes_are_told_by_template_and_unknown_paths_share_one_label(traced, vote):
    settings, _, _ = traced
    for path in ("/nowhere-1", "/nowhere-2", "/static/chat.js", f"/v1/feedback/{vote[0]}/receipt"):
        httpx.get(f"{settings.public_url}{path}", headers=settings.credentials, trust_env=False)
    labels = figures(settings, "api")["everloop_http_requests_total"].keys()
    routes = {dict(label)["route"] for label in labels}
    assert {"unmatched", "/static", "/v1/feedback/{feedback_id}/receipt"} <= routes
    assert not any("nowhere" in route or vote[0] in route for route in routes)


def test_logs_are_json_lines_with_ids_and_without_words(traced, vote):
    settings, _, _ = traced
    for part in ("api", "relay", "ledger", "reward"):
        text = (settings.log_dir / f"{part}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{") or pytest.fail(line)]
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines), part
        assert lines or part == "api"
        assert WORDS not in text and not re.search(r"everloop:[^@*]+@", text)


def targets(settings):
    return json.loads(settings.metrics_targets_file.read_text())


def figures(settings, part):
    """Return a part's samples by name, and labels as sorted pairs."""
    (place,) = next(t["targets"] for t in targets(settings) if t["labels"]["part"] == part)
    text = httpx.get(f"http://{place}/metrics", trust_env=False).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found
