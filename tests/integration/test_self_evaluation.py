"""Self-evaluation on a real engine: once per answer, by the release that gave it, where that is allowed."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import orjson
import sqlalchemy as sa

from agent.self_evaluation import conversation
from feedback import episodes
from feedback.episodes import COLUMNS, Recording
from feedback.tables import Episode, SelfEvaluation
from infra.engine import EngineClient
from infra.events import SelfEvaluated
from infra.tables import OutboxRow
from tests.conftest import wait_until


def evaluation(stack, episode_id):
    with stack.sessions() as session:
        return session.get(SelfEvaluation, episode_id)


def events(stack, episode_id):
    with stack.sessions() as session:
        rows = session.scalars(
            sa.select(OutboxRow.value).where(OutboxRow.topic == SelfEvaluated.topic, OutboxRow.key == episode_id)
        )
        envelopes = [orjson.loads(value) for value in rows]
    return [e for e in envelopes if e["type"] == "dev.everloop.episode.self_evaluated"]


def recorded(stack, episode_id, **changes):
    """Return the recording of an episode that is there."""
    with stack.sessions() as session:
        row = session.get_one(Episode, episode_id)
    values = {name: getattr(row, name) for name in COLUMNS}
    return Recording(**({"episode_id": episode_id} | values | changes))


def test_an_answer_is_evaluated_once_by_the_release_that_gave_it(stack):
    completion = stack.ask("What is the capital of France?", max_tokens=24)
    row = wait_until(lambda: evaluation(stack, completion.id), timeout_s=10, what="there is no self-evaluation")
    assert row.release == completion.model and 0 < row.p_good < 1
    (event,) = events(stack, completion.id)
    assert SelfEvaluated.from_cloudevent(event).p_good == row.p_good
    assert stack.http.get(f"/v1/episodes/{completion.id}").json()["self_evaluation"] == row.p_good
    with stack.sessions.begin() as session:
        assert not episodes.record_self_evaluation(session, recorded(stack, completion.id), 0.5)
    assert len(events(stack, completion.id)) == 1 and evaluation(stack, completion.id).p_good == row.p_good


def test_a_stream_is_evaluated_too(stack):
    episode_id = list(stack.ask("Name a fruit.", stream=True))[-1].id
    wait_until(lambda: evaluation(stack, episode_id), timeout_s=10, what="there is no self-evaluation")


def test_an_answer_that_may_not_be_learned_from_is_not_evaluated(stack):
    silent = stack.ask("Name a river.", store=False)
    for _ in range(2):
        later = stack.ask("Name a mountain.")
        wait_until(lambda later=later: evaluation(stack, later.id), timeout_s=10)
    assert evaluation(stack, silent.id) is None and events(stack, silent.id) == []
    assert stack.http.get(f"/v1/episodes/{silent.id}").json()["self_evaluation"] is None


def test_what_a_forgotten_user_was_told_is_not_evaluated(stack):
    completion = stack.ask("Name a bird.", user="soon-forgotten", store=False)
    late = recorded(stack, completion.id, learn=True)
    assert stack.http.delete("/v1/me", headers={"X-Everloop-User": "soon-forgotten"}).status_code == 202
    with stack.sessions.begin() as session:
        assert not episodes.record_self_evaluation(session, late, 0.5)
    assert evaluation(stack, completion.id) is None


def test_the_probability_depends_on_the_answer_and_not_on_the_asking(stack):
    """What the smallest model believes need not be right; it must be what it believes of this answer."""
    question = "How do I boil an egg?"
    completion = stack.ask(question, max_tokens=8)
    answers = ["Put the egg into boiling water for eight minutes.", "flub zorp 77 the the the the"]

    async def ask(answer):
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            messages = conversation(recorded(stack, completion.id, answer=answer))
            return [await engine.p_yes("base", messages) for _ in range(2)]

    good, nonsense = (asyncio.run(ask(answer)) for answer in answers)
    assert all(0 < p < 1 for p in good + nonsense)
    assert abs(good[0] - good[1]) < 0.05 and abs(good[0] - nonsense[0]) > 0.05


def test_an_evaluation_leaves_the_log_probabilities_of_its_neighbours_alone(stack):
    """Where both are in one batch, the engine gathers other tokens for the evaluation."""
    question = [{"role": "user", "content": "Is water wet? Reply Yes or No."}]

    async def evaluate_until(done):
        num_evaluated = 0
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            while not all(future.done() for future in done):
                await engine.p_yes("base", question)
                num_evaluated += 1
        return num_evaluated

    with ThreadPoolExecutor(4) as pool:
        chats = [pool.submit(stack.ask, f"Describe the number {n}.", max_tokens=32) for n in range(8)]
        assert asyncio.run(evaluate_until(chats)) >= 4, "they did not run side by side"
    with stack.sessions() as session:
        rows = [session.get_one(Episode, chat.result().id) for chat in chats]
    assert all(len(row.logprobs) == len(row.token_ids) for row in rows)
    assert all(-100 < logprob <= 0 for row in rows for logprob in row.logprobs)


def test_the_outcomes_are_metrics(stack):
    lines = stack.http.get("/metrics").text.splitlines()
    counts = dict(line.split() for line in lines if line.startswith("everloop_self_evaluations_total"))
    assert float(counts['everloop_self_evaluations_total{outcome="recorded"}']) > 0
    assert 'everloop_self_evaluations_total{outcome="dropped"}' in counts
