"""Self-evaluation: one at a time; too many are dropped, errors are lost, what may not be learned from is left."""

import asyncio
import contextlib
import math
import time

import httpx
import pytest
from prometheus_client import REGISTRY

from agent import self_evaluation
from agent.self_evaluation import MAX_WAITING, OUTCOMES, QUESTION, SelfEvaluator
from feedback.episodes import Recording
from infra.engine import EngineClient
from infra.engine_wire import EngineError
from infra.settings import Settings


def recording(number=0, **changes):
    values = {
        "episode_id": f"ep_{number}", "user_id": "ada", "release": "r1", "adapter_digest": None, "canary_id": None,
        "arm": "champion", "propensity": 1.0, "messages": [{"role": "user", "content": "Why?"}], "sampling": {},
        "learn": True, "answer": "Because.", "status": "complete",
    }  # fmt: skip
    return Recording(**(values | changes))


class Engine:
    """Stands where the engine would; evaluations wait at the gate while it is closed."""

    def __init__(self):
        self.asked = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failing = None
        self.idle_s = 60.0
        self.num_others = 0

    async def num_requests(self):
        if self.num_others < 0:
            raise EngineError("It does not tell.", code="engine_refused")
        return self.num_others

    async def p_yes(self, release, messages):
        self.asked.append((release, messages))
        await self.gate.wait()
        if self.failing:
            raise self.failing
        return 0.75


def run(work, tmp_path, monkeypatch, **settings):
    """Run `work` on a running evaluator; return what was written."""
    written = []

    def write(session, recording, p_good):
        written.append((recording.episode_id, p_good))
        return True

    monkeypatch.setattr(self_evaluation, "transaction", lambda sessions: contextlib.nullcontext())
    monkeypatch.setattr(self_evaluation.episodes, "record_self_evaluation", write)

    async def inside():
        engine = Engine()
        async with SelfEvaluator(None, engine, Settings(home=tmp_path, **settings)).running() as evaluator:
            await work(evaluator, engine)

    asyncio.run(asyncio.wait_for(inside(), 10))
    return written


@pytest.fixture(autouse=True)
def count_from_zero():
    for outcome in ("recorded", "dropped", "lost"):
        OUTCOMES.labels(outcome).reset()


def count(outcome):
    return REGISTRY.get_sample_value("everloop_self_evaluations_total", {"outcome": outcome})


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_the_release_that_answered_is_asked_about_its_answer_in_its_conversation(tmp_path, monkeypatch):
    async def work(evaluator, engine):
        await evaluator.offer(recording())
        await until(lambda: count("recorded") == 1)
        ((release, messages),) = engine.asked
        assert release == "r1" and messages == [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because."},
            {"role": "user", "content": QUESTION},
        ]

    assert run(work, tmp_path, monkeypatch) == [("ep_0", 0.75)]


def test_one_is_asked_at_a_time_and_what_cannot_wait_is_dropped_and_counted(tmp_path, monkeypatch):
    num_taken = 1 + MAX_WAITING

    async def work(evaluator, engine):
        engine.gate.clear()
        await evaluator.offer(recording(0))
        await until(lambda: engine.asked)
        for number in range(1, num_taken + 5):
            await evaluator.offer(recording(number))
        await asyncio.sleep(0.02)
        assert len(engine.asked) == 1 and count("dropped") == 5
        engine.gate.set()
        await until(lambda: count("recorded") == num_taken)

    assert [episode for episode, _ in run(work, tmp_path, monkeypatch)] == [f"ep_{n}" for n in range(num_taken)]


def test_it_waits_until_nobody_else_wants_the_engine(tmp_path, monkeypatch):
    async def work(evaluator, engine):
        engine.idle_s = 0.0
        await evaluator.offer(recording())
        await asyncio.sleep(0.2)
        assert engine.asked == []
        engine.idle_s = 60.0
        await until(lambda: count("recorded"))

    assert run(work, tmp_path, monkeypatch) == [("ep_0", 0.75)]


def test_it_waits_while_the_engine_works_for_others_such_as_a_run_that_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(self_evaluation, "LONG_POLL_S", 0.01)
    monkeypatch.setattr(self_evaluation, "PATIENCE_S", 0.05)

    async def work(evaluator, engine):
        engine.num_others = 1
        await evaluator.offer(recording())
        await asyncio.sleep(0.2)  # longer than it waits for our own clients
        assert engine.asked == []
        engine.idle_s, engine.num_others = 0.0, 0  # somebody asks just when the others are done
        monkeypatch.setattr(self_evaluation, "PATIENCE_S", 60.0)
        await asyncio.sleep(0.1)
        assert engine.asked == []
        engine.idle_s = 60.0
        await until(lambda: count("recorded") == 1)
        engine.num_others = 1
        monkeypatch.setattr(self_evaluation, "LONG_PATIENCE_S", 0.05)
        await evaluator.offer(recording(1))
        await until(lambda: count("recorded") == 2)
        monkeypatch.setattr(self_evaluation, "LONG_PATIENCE_S", 60.0)
        engine.num_others = -1
        await evaluator.offer(recording(2))
        await until(lambda: count("recorded") == 3)

    assert [episode for episode, _ in run(work, tmp_path, monkeypatch)] == ["ep_0", "ep_1", "ep_2"]


def test_under_load_that_does_not_end_its_patience_does(tmp_path, monkeypatch):
    monkeypatch.setattr(self_evaluation, "PATIENCE_S", 0.1)

    async def work(evaluator, engine):
        engine.idle_s = 0.0
        for number in range(3):
            await evaluator.offer(recording(number))
        started_s = time.monotonic()
        await until(lambda: count("recorded") == 3)
        assert time.monotonic() - started_s >= 0.3, "each waits its turn"

    assert len(run(work, tmp_path, monkeypatch)) == 3


@pytest.mark.parametrize("error", [EngineError("away"), KeyError("logprobs")], ids=["of the engine", "of ours"])
def test_an_error_loses_its_answer_only(tmp_path, monkeypatch, error):
    async def work(evaluator, engine):
        engine.failing = error
        for number in range(2):
            await evaluator.offer(recording(number))
        await until(lambda: count("lost") == 2)
        engine.failing = None
        await evaluator.offer(recording(9))
        await until(lambda: count("recorded") == 1)

    assert run(work, tmp_path, monkeypatch) == [("ep_9", 0.75)]


@pytest.mark.parametrize(
    "changes", [{"learn": False}, {"status": "interrupted"}, {"status": "failed"}, {"answer": ""}], ids=str
)
def test_what_may_not_be_learned_from_or_did_not_end_is_not_evaluated(tmp_path, monkeypatch, changes):
    async def work(evaluator, engine):
        await evaluator.offer(recording(0, **changes))
        await evaluator.offer(recording(1))
        await until(lambda: count("recorded") == 1)
        assert len(engine.asked) == 1

    assert run(work, tmp_path, monkeypatch) == [("ep_1", 0.75)]


def test_it_can_be_turned_off(tmp_path, monkeypatch):
    async def work(evaluator, engine):
        await evaluator.offer(recording())
        await asyncio.sleep(0.02)
        assert engine.asked == []

    assert run(work, tmp_path, monkeypatch, self_evaluation=False) == []


def test_the_end_does_not_wait_for_an_engine_that_hangs(tmp_path, monkeypatch):
    async def work(evaluator, engine):
        engine.gate.clear()
        await evaluator.offer(recording())
        await until(lambda: engine.asked)

    assert run(work, tmp_path, monkeypatch) == []


def engine_reporting(top_logprobs, tokens=(7,)):
    """Return a client of an engine that tokenizes every word so, and reports these log-probabilities."""

    def answer(request):
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": list(tokens)})
        entries = [{"token": token, "logprob": logprob} for token, logprob in top_logprobs.items()]
        return httpx.Response(200, json={"choices": [{"logprobs": {"content": [{"top_logprobs": entries}]}}]})

    client = EngineClient("http://engine")
    client._http = httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(answer))
    return client


@pytest.mark.parametrize(
    ("yes", "no", "p"), [(math.log(0.3), math.log(0.1), 0.75), (-9999.0, -0.5, 0.0), (-0.5, -9999.0, 1.0)]
)
def test_p_yes_is_the_share_of_yes_among_the_two(yes, no, p):
    assert asyncio.run(engine_reporting({" Yes": yes, "No": no}).p_yes("base", [])) == pytest.approx(p)


@pytest.mark.parametrize(
    "engine",
    [engine_reporting({"Oui": -1.0, "Non": -1.0}), engine_reporting({"Yes": -1.0}), engine_reporting({}, (1, 2))],
    ids=["other words", "one word", "two tokens"],
)
def test_what_is_not_yes_and_no_is_no_probability(engine):
    with pytest.raises(EngineError) as refused:
        asyncio.run(engine.p_yes("base", []))
    assert refused.value.code == "not_yes_or_no"


def test_the_engine_is_idle_since_its_last_stream_ended():
    async def work():
        def answer(request):
            return httpx.Response(200, text="data: [DONE]\n\n")

        client = EngineClient("http://engine")
        client._http = httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(answer))
        assert client.idle_s > 1e6
        async with client.stream_chat({}):
            async with client.stream_chat({}):
                assert client.idle_s == 0
            assert client.idle_s == 0
        assert 0 <= client.idle_s < 5
        await asyncio.sleep(0.02)
        assert client.idle_s >= 0.02

    asyncio.run(work())
