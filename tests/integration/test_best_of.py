"""The best of several answers: when others are made, which one is given, what it takes, and no reward at all."""

import asyncio

import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Request

from deploy import choosing
from deploy.tables import Release
from feedback.tables import Episode
from reward.online import sigmoid
from tests.scripted_engine import ScriptedEngine, api_on, served

ASK = {"model": "everloop", "messages": [{"role": "user", "content": "Why?"}], "user": "ada", "max_tokens": 16}
WEAK, GOOD = "It is so.", "Because light is scattered."


class ScriptedReward:
    """Finds an answer as good as it is told to; sure of it unless `sd` says otherwise."""

    def __init__(self):
        self.asked, self.sd, self.pause_s = [], 0.1, 0.0
        self.means = {WEAK: -2.0, GOOD: 2.0}
        self.app = FastAPI()
        self.app.post("/v1/rewards/score")(self.score)

    async def score(self, request: Request):
        body = await request.json()
        self.asked.append([item["answer"] for item in body["items"]])
        await asyncio.sleep(self.pause_s)

        def one(item):
            if self.means.get(item["answer"]) == "very":
                return {"mean": "very"}
            mean = self.means.get(item["answer"], 0.0)
            told = {"mean": mean, "sd": self.sd, "p_good": sigmoid(mean), "abstain": False}
            return {**told, "reward": mean - 0.5 * self.sd, "contributions": {}}

        data = [one(item) for item in body["items"]]
        return {"encoder": "e", "update_seq": 1, "snapshot_id": None, "kappa": 0.5, "data": data}


def answers(payload, choice):
    return ["Blue, I think.", GOOD, "No idea."][choice] if "n" in payload else WEAK


@pytest.fixture
def engine():
    return ScriptedEngine(answers)


@pytest.fixture
def reward():
    return ScriptedReward()


@pytest.fixture
def ask(engine, reward, database, tmp_path):
    """A function that asks under some settings; returns the response and the episode."""

    def asking(body=None, **options):
        with (
            served(reward.app) as reward_url,
            api_on(engine, database, tmp_path, reward_url=reward_url, **options) as http,
        ):
            answer = http.post("/v1/chat/completions", json={**ASK, **(body or {})})
            assert answer.status_code == 200, answer.text
        with database() as session:
            row = session.scalars(sa.select(Episode).order_by(Episode.id.desc()).limit(1)).one()
        return answer, row

    return asking


def test_it_is_off_unless_somebody_turns_it_on(ask, reward):
    answer, row = ask()
    assert row.steps == [] and "best_of" not in answer.json()["usage"] and not reward.asked


def test_of_a_weak_answer_the_best_of_several_is_given(ask, engine, reward):
    answer, row = ask({"logprobs": True, "seed": 5}, best_of=4)
    choice, used = answer.json()["choices"][0], answer.json()["usage"]
    assert choice["message"]["content"] == row.answer == GOOD
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == GOOD
    assert len(row.token_ids) == len(row.logprobs) == used["completion_tokens"] == 4
    (step,) = row.steps
    assert (step["outcome"], step["n"], step["num_candidates"], step["chosen"]) == ("better", 4, 4, 2)
    assert step["extra_tokens"] == 9 and step["rewards"] == [-2.05, -0.05, 1.95, -0.05] and step["ms"] > 0
    assert used["best_of"]["extra_tokens"] == 9 and used["best_of"]["outcome"] == "better"
    first, again = engine.asked
    assert again == {**first, "n": 3, "seed": 6}
    assert reward.asked == [[WEAK], ["Blue, I think.", GOOD, "No idea."]]


def test_a_good_answer_costs_one_look(ask, engine, reward):
    reward.means[WEAK] = 1.0
    _, row = ask(best_of=4)
    assert (row.answer, row.steps[0]["outcome"], len(engine.asked)) == (WEAK, "good_enough", 1)


def test_who_is_not_sure_changes_nothing(ask, engine, reward):
    reward.sd = 3.0
    _, row = ask(best_of=4)
    assert (row.answer, row.steps[0]["outcome"], len(engine.asked)) == (WEAK, "unsure", 1)


def test_what_is_surely_weak_need_not_be_known_to_a_hair(ask, reward):
    """After 130 votes of real people's kind: a logit of -4.4, give or take 1.2."""
    reward.means[WEAK], reward.sd = -4.4, 1.2
    assert ask(best_of=4)[1].answer == GOOD
    assert ask(best_of=4, best_of_margin_sd=4.0)[1].steps[0]["outcome"] == "unsure"
    reward.means[WEAK] = -2000.0
    assert ask(best_of=4)[1].answer == GOOD


def test_of_equals_the_first_is_given(ask, reward):
    reward.means = dict.fromkeys([WEAK, GOOD, "Blue, I think.", "No idea."], -1.0)
    _, row = ask(best_of=4)
    assert (row.answer, row.steps[0]["outcome"], row.steps[0]["chosen"]) == (WEAK, "first_kept", 0)


@pytest.mark.parametrize(("budget", "made"), [(15, 0), (16, 1), (47, 2)])
def test_no_more_tokens_are_made_than_the_budget_allows(ask, engine, budget, made):
    _, row = ask(best_of=4, best_of_max_tokens=budget)
    assert row.steps[0]["num_candidates"] == 1 + made
    assert (engine.asked[-1].get("n"), row.steps[0]["outcome"] == "out_of_tokens") == (made or None, made == 0)


def test_a_slow_reward_model_keeps_nobody_waiting(ask, reward):
    reward.pause_s = 5.0
    _, row = ask(best_of=4, best_of_max_ms=300)
    assert (row.answer, row.status) == (WEAK, "complete")
    assert row.steps[0]["outcome"] in ("out_of_time", "reward_unavailable") and row.latency_ms < 2000


def test_what_is_no_score_changes_nothing(ask, reward):
    reward.means[WEAK] = "very"
    _, row = ask(best_of=4)
    assert (row.answer, row.status, row.steps[0]["outcome"]) == (WEAK, "complete", "reward_unavailable")


def test_an_answer_that_cannot_be_stored_is_mended_before_it_is_scored(ask, engine, reward):
    engine.script = lambda payload, choice: "Half\x00 of it." if "n" in payload else WEAK
    reward.means["Half of it."] = 3.0
    _, row = ask(best_of=2)
    assert (row.answer, row.steps[0]["outcome"]) == ("Half of it.", "better")


def test_an_operator_sees_what_it_took(engine, reward, database, tmp_path):
    with (
        served(reward.app) as url,
        api_on(engine, database, tmp_path, reward_url=url, best_of=4) as http,
    ):
        assert "Choosing among answers" not in http.get("/operate/releases/base").text
        for _ in range(3):
            http.post("/v1/chat/completions", json=ASK)
        page = http.get("/operate/releases/base")
    assert page.status_code == 200 and "Choosing among answers" in page.text
    with database() as session:
        (told,) = choosing.lately(session, "base")
    assert (told.outcome, told.num_answers, told.extra_tokens) == ("better", 3, 27) and told.p50_ms > 0


def test_without_a_reward_model_the_first_answer_is_given(engine, database, tmp_path):
    with api_on(engine, database, tmp_path, reward_url="http://127.0.0.1:9", best_of=4) as http:
        answer = http.post("/v1/chat/completions", json=ASK).json()
    assert answer["choices"][0]["message"]["content"] == WEAK
    assert answer["usage"]["best_of"]["outcome"] == "reward_unavailable"


def test_what_is_streamed_or_asked_for_several_times_is_not_chosen_from(ask, reward):
    for body in ({"stream": True}, {"n": 2}):
        _, row = ask(body, best_of=4)
        assert row.steps == [] and not reward.asked


def test_what_a_release_is_never_changes(database):
    with database.begin() as session:
        session.add(Release(name="base-best4", variant_of="base", decoding={"best_of": 4}))
    with pytest.raises(sa.exc.DBAPIError, match="does not change"), database.begin() as session:
        session.execute(sa.update(Release).where(Release.name == "base-best4").values(decoding={"best_of": 8}))
