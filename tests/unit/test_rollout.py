"""Rollouts: people first, versions told apart, what is too old made anew."""

import asyncio
import logging
import threading
from contextlib import closing
from functools import partial

import httpx
import pytest

from infra.engine import MODEL_GONE, EngineClient
from infra.errors import EverloopError, UnavailableError
from trainer import grpo, rollout
from trainer import throttle as throttle_module
from trainer.grpo import Rollouts
from trainer.policy import ServedPolicy
from trainer.recipe import resolve
from trainer.recipes import grpo as grpo_recipe
from trainer.rollout import Sample, Sampling, sample
from trainer.throttle import Throttle

ASK = [{"role": "user", "content": "Why?"}]


def prompts_of(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


class Engine:
    """Answers after a moment; `others` sequences of other people are there too."""

    def __init__(self, others=lambda: 0, takes_s=0.02):
        self.others = others
        self.takes_s = takes_s
        self.in_flight = 0
        self.most = 0
        self.asked = []

    async def num_requests(self):
        return self.in_flight + self.others()

    async def chat(self, payload):
        self.asked.append(payload)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(self.takes_s)
        finally:
            self.in_flight -= 1
        choice = {
            "message": {"content": "So."},
            "finish_reason": "stop",
            "token_ids": [5, 2],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
        }
        return {"choices": [choice], "prompt_token_ids": [1, 7]}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(throttle_module, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(throttle_module, "QUIET_S", 0.05)


def run(engine, num_prompts, throttle, **more):
    options = {"num_samples": 2, "sampling": Sampling(8), "seed": 3, **more}
    return asyncio.run(sample(engine, "base", [ASK] * num_prompts, throttle=throttle, **options))


def test_a_sample_has_the_ids_and_log_probabilities_that_the_engine_used():
    engine = Engine()
    found = run(engine, 1, None, sampling=Sampling(8, 0.7, 0.9, 40))
    assert found == [[Sample("So.", "stop", (1, 7), (5, 2), (-0.5, -0.25), "base")] * 2]
    payload, other = engine.asked
    assert payload["seed"] != other["seed"]
    assert payload["logprobs"] and payload["return_token_ids"]
    assert (payload["temperature"], payload["top_p"], payload["top_k"]) == (0.7, 0.9, 40)
    assert not Sampling(8, 0.7).is_plain and not Sampling(8, top_k=4).is_plain and Sampling(8).is_plain


def test_alone_the_engine_is_filled_and_beside_people_it_is_left_to_them(quick):
    alone, busy = Engine(), Engine(lambda: 1)
    run(alone, 12, Throttle(8, 2))
    assert alone.most == 8
    run(busy, 12, Throttle(8, 2))
    assert busy.most == 2 and len(busy.asked) == 24


def test_what_is_in_flight_when_somebody_asks_makes_room_and_is_asked_for_again(quick):
    engine = Engine(takes_s=0.1)
    throttle = Throttle(8, 2)

    async def scene():
        found = asyncio.create_task(
            sample(engine, "base", [ASK] * 4, num_samples=2, sampling=Sampling(8), seed=3, throttle=throttle)
        )
        await asyncio.sleep(0.03)
        assert engine.in_flight == 8
        engine.others = lambda: 1
        await asyncio.sleep(0.03)
        assert engine.in_flight == 2
        engine.others = lambda: 0
        return await found

    assert [len(group) for group in asyncio.run(scene())] == [2] * 4
    seeds = [payload["seed"] for payload in engine.asked]
    assert throttle.num_given_up == 6 and len(seeds) == 14 and len(set(seeds)) == 8


def test_a_run_that_samples_twice_at_once_does_not_take_itself_for_somebody_else(quick):
    engine, throttles = Engine(), [Throttle(8, 2), Throttle(8, 2)]

    async def scene():
        ask = {"num_samples": 2, "sampling": Sampling(8), "seed": 3}
        await asyncio.gather(*(sample(engine, "base", [ASK] * 12, throttle=one, **ask) for one in throttles))

    asyncio.run(scene())
    assert engine.most == 16 and [throttle.num_given_up for throttle in throttles] == [0, 0]


def test_sampling_that_is_cancelled_leaves_nothing_in_flight(quick):
    engine = Engine(lambda: 1, takes_s=30.0)

    async def scene():
        found = asyncio.create_task(sample(engine, "base", [ASK], num_samples=2, sampling=Sampling(8), seed=3))
        await asyncio.sleep(0.03)
        found.cancel()
        with pytest.raises(asyncio.CancelledError):
            await found
        await asyncio.sleep(0.01)

    asyncio.run(scene())
    assert engine.asked and engine.in_flight == 0


def test_when_people_leave_the_engine_is_filled_again(quick):
    async def scene():
        gate = Throttle(8, 2)
        await gate.look(Engine(lambda: 1))
        assert gate.limit == 2
        await asyncio.sleep(0.06)
        return gate.limit

    assert asyncio.run(scene()) == 8


def test_an_engine_that_does_not_tell_its_queue_holds_nothing_back(quick):
    class Silent(Engine):
        async def num_requests(self):
            raise EverloopError("There are no metrics.", code="engine_error")

    engine = Silent()
    assert len(run(engine, 6, Throttle(4, 1))) == 6 and engine.most == 4


class Restarted(Engine):
    """Is away for the first requests."""

    def __init__(self, refusals):
        super().__init__()
        self.refusals = refusals

    async def chat(self, payload):
        if self.refusals:
            self.refusals -= 1
            raise UnavailableError("The engine does not answer.", code="engine_unavailable")
        return await super().chat(payload)


def test_a_run_outlives_an_engine_that_is_started_anew(quick, monkeypatch):
    monkeypatch.setattr(rollout, "ASK_AGAIN_S", 0.001)
    assert len(run(Restarted(5), 3, None)) == 3
    monkeypatch.setattr(rollout, "patiently", partial(rollout.patiently, patience_s=0.0))
    with pytest.raises(UnavailableError):
        run(Restarted(5), 3, None)


class Forgetful(Engine):
    """Was started anew, and has lost what it is asked for."""

    def __init__(self):
        super().__init__()
        self.is_restored = False

    async def chat(self, payload):
        if not self.is_restored:
            raise UnavailableError("The engine is loading the release.", code=MODEL_GONE)
        return await super().chat(payload)


def test_a_run_gives_the_engine_its_own_version_again(quick, monkeypatch):
    monkeypatch.setattr(rollout, "ASK_AGAIN_S", 0.001)
    asked = []

    async def restore(engine):
        asked.append(engine)
        if len(asked) == 1:  # it is away again
            raise UnavailableError("The engine does not answer.", code="engine_unavailable")
        engine.is_restored = True

    engine = Forgetful()
    assert len(run(engine, 3, None, restore=restore)) == 3 and set(asked) == {engine}


METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="base"} 3.0
vllm:num_requests_waiting{engine="0",model_name="base"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 2.0
"""


def client(handler):
    engine = EngineClient("http://engine")
    engine._http = httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(handler))
    return engine


def test_the_engines_queue_is_read_from_its_metrics():
    engine = client(lambda request: httpx.Response(200, text=METRICS))
    assert asyncio.run(engine.num_requests()) == 5


@pytest.mark.parametrize(("logprob", "is_processed"), [(0.0, True), (-2.3, False)])
def test_whether_log_probabilities_are_processed_is_seen_from_one_token(logprob, is_processed):
    body = {"choices": [{"logprobs": {"token_logprobs": [logprob]}}]}
    engine = client(lambda request: httpx.Response(200, json=body))
    assert asyncio.run(engine.logprobs_are_processed("base")) is is_processed


class Policy(ServedPolicy):
    """Versions without an engine."""

    def __init__(self):
        self.version, self.run_id, self.engine_url = 1, "r", "http://engine"


class Asked:
    """Samples of whichever version is asked; remembers."""

    def __init__(self, before=lambda: None):
        self.calls = []
        self.before = before

    def __call__(self, model, prompts, seed):
        self.before()
        self.calls.append((model, [p[0]["content"] for p in prompts], threading.current_thread().name))
        return [[Sample(f"{p[0]['content']} {n}", "stop", model=model) for n in range(2)] for p in prompts]


def rollouts(policy, ask, prompts, ahead=0, max_lag=4):
    return Rollouts(policy, ask, num_samples=2, prompts=prompts, batch_prompts=2, ahead=ahead, max_lag=max_lag)


def test_without_looking_ahead_samples_are_of_the_newest_version():
    policy, ask = Policy(), Asked()
    prompts = prompts_of("a", "b", "c", "d")
    with closing(rollouts(policy, ask, prompts)) as found:
        found.batch(prompts[:2])
        policy.version = 2
        assert {one.model for group in found.batch(prompts[2:]) for one in group} == {"run/r@2"}
    assert [texts for _, texts, _ in ask.calls] == [["a", "b"], ["c", "d"]]


def test_looking_ahead_samples_while_the_policy_trains_and_what_is_too_old_is_made_anew():
    policy, ask = Policy(), Asked()
    prompts = prompts_of(*"abcdef")
    with closing(rollouts(policy, ask, prompts, ahead=2, max_lag=1)) as found:
        found.batch(prompts[:2])
        found._pending[-1][1].result()  # both batches ahead were sampled of version 1
        policy.version = 2
        assert {policy.lag(one.model) for group in found.batch(prompts[2:4]) for one in group} == {1}
        assert found.num_dropped == 0
        policy.version = 3
        assert {policy.lag(one.model) for group in found.batch(prompts[4:]) for one in group} == {0}
        assert found.num_dropped == 4
    assert [texts for _, texts, _ in ask.calls] == [["a", "b"], ["c", "d"], ["e", "f"], ["e", "f"]]
    assert ask.calls[1][2] != ask.calls[0][2] == ask.calls[3][2]


def test_a_run_that_goes_on_looks_ahead_from_where_it_is():
    policy, ask = Policy(), Asked()
    prompts = prompts_of(*"abcdef")
    with closing(rollouts(policy, ask, prompts, ahead=1)) as found:
        found.batch(prompts[2:4])
        found._pending[-1][1].result()
        found.batch(prompts[4:])
    assert [texts for _, texts, _ in ask.calls] == [["c", "d"], ["e", "f"]]


def test_no_two_batches_and_no_two_versions_are_sampled_with_the_same_seeds(monkeypatch):
    seeds = []

    async def sampled(engine, model, prompts, *, seed, **_):
        seeds.append(seed)
        return [[]]

    monkeypatch.setattr(grpo, "sample", sampled)
    ask = grpo.sampler(Policy(), Sampling(8), 2, 5)
    for model, number in (("run/r@1", 1), ("run/r@1", 2), ("run/r@2", 1), ("run/r@1", 1)):
        ask(model, [ASK], number)
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3]


def test_log_probabilities_from_before_the_temperature_end_a_run_that_weighs_by_them(monkeypatch):
    class Raw(EngineClient):
        async def logprobs_are_processed(self, model):
            return False

    async def sampled(*_, **__):
        return [[]]

    monkeypatch.setattr(grpo, "sample", sampled)
    monkeypatch.setattr(grpo, "EngineClient", Raw)
    assert grpo.sampler(Policy(), Sampling(8), 2, 5)("run/r@1", [ASK], 1) == [[]]
    with pytest.raises(EverloopError) as refused:
        grpo.sampler(Policy(), Sampling(8, temperature=0.7), 2, 5)("run/r@1", [ASK], 1)
    assert refused.value.code == "logprobs_not_processed"


def test_prompts_that_were_not_expected_are_sampled_when_asked_for():
    policy, ask = Policy(), Asked()
    prompts = prompts_of("a", "b", "c", "d")
    with closing(rollouts(policy, ask, prompts, ahead=1)) as found:
        found.batch(prompts[:2])
        other = prompts_of("x", "y")
        assert [group[0].text for group in found.batch(other)] == ["x 0", "y 0"]


def test_a_prompt_without_answers_ends_the_training_with_that_reason():
    policy = Policy()
    with (
        closing(rollouts(policy, lambda *_: [[], []], prompts_of("a", "b"))) as found,
        pytest.raises(EverloopError) as refused,
    ):
        found.batch(prompts_of("a", "b"))
    assert refused.value.code == "prompt_refused"


def test_what_people_write_stays_out_of_the_log_where_no_reward_is_a_number(caplog):
    log = logging.getLogger("trl.trainer.grpo_trainer")
    log.warning("All reward functions returned None for the following kwargs:\n{'prompt': 'secret'}")
    log.warning("Something else.")
    assert [record.message for record in caplog.records] == ["Something else."]


def test_grpo_asks_for_what_its_steps_take_and_no_more():
    config = resolve({"recipe": "grpo", "batch_rows": 8, "samples_per_prompt": 4, "epochs": 1.5})[1]
    asked = grpo_recipe._asked(prompts_of(*"abcdef"), config)  # two prompts a step: 4.5 steps, which are 5
    assert asked == prompts_of(*"abcdefabcd")
